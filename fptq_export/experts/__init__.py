"""Mixtures of experts as linears: what trace and calibration put in the place of stacked expert weights."""
