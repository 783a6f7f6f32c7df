"""Seconds that a linear takes for one token: modelled, or looked up in a table that somebody measured.

The model is a roofline of weights read once (`fptq_export.roofline.decode`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from calib.auto.candidates import Candidate
from fptq_export.errors import UserError
from fptq_export.policy import Activation, Precision
from fptq_export.roofline.decode import decode_s
from fptq_export.roofline.devices import DEVICES, Device
from fptq_export.roofline.measured import read_cost_table
from fptq_export.roofline.model import Shape
from fptq_export.sites import Linear

__all__ = ["MODELLED_DEVICE", "DecodeCost", "cost_from_device", "cost_from_table"]

DecodeCost = Callable[[Linear, Candidate], float]
"""Seconds of a linear that runs a candidate, for one token."""

MODELLED_DEVICE = "RTX 4090"
"""Where no table says better: for one token, candidates differ in bytes and launches."""


def cost_from_device(name: str = MODELLED_DEVICE) -> DecodeCost:
    """The modelled cost on a device of `fptq_export.roofline.devices`. Raises KeyError for another name."""
    device = {device.name: device for device in DEVICES}[name]
    return lambda linear, candidate: _modelled(linear, candidate, device)


def cost_from_table(path: Path, asked: Iterable[tuple[Linear, Iterable[Candidate]]]) -> DecodeCost:
    """Read a measured table.

    Args:
        path: JSON, a `CostTable`.
        asked: Linears and what each of them could run, all of which the table must have.

    Raises:
        UserError: The file cannot be read, or lacks a time; says which.
    """
    table = read_cost_table(path)
    seconds = {
        (entry.precision, entry.activation, entry.group_size, entry.in_features, entry.out_features): 1e-6
        * entry.microseconds
        for entry in table.entries
    }
    missing = dict.fromkeys(
        key
        for linear, candidates in asked
        for candidate in candidates
        if (key := _key(linear, candidate)) not in seconds
    )
    if missing:
        precision, activation, group_size, in_features, out_features = next(iter(missing))
        cause = (
            f"{len(missing)} times are missing, the first for {precision}, {activation or 'float input'}, "
            f"group size {group_size}, {in_features} -> {out_features}"
        )
        raise UserError(str(path), cause, "measure them too, or leave --cost-table out to use the model")
    return lambda linear, candidate: seconds[_key(linear, candidate)]


_Key = tuple[Precision, Activation | None, int | None, int, int]


def _key(linear: Linear, candidate: Candidate) -> _Key:
    """LAE costs nothing at run time, so its times are those of `static`."""
    tier = "static" if candidate.activation == "lae_static" else candidate.activation
    return (candidate.precision, tier, candidate.group_size, linear.in_features, linear.out_features)


def _modelled(linear: Linear, candidate: Candidate, device: Device) -> float:
    shape = Shape(linear.out_features, linear.in_features)
    return decode_s(shape, candidate.precision, candidate.activation, candidate.group_size, device)
