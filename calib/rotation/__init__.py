"""Rotate the residual stream by a fixed orthogonal matrix, fused into the weights: an exact rewrite of a model.

RMSNorm divides a vector by its length, which a rotation keeps. So the residual stream x may become x Q everywhere: what
writes it is multiplied by Q, what reads it by Q^T, and the norm weights in between move into the readers first
(QuaRot, arXiv 2404.00456, stage 1; SliceGPT, arXiv 2401.15024). With Q a Hadamard matrix, outlier channels are spread
over all channels. Rotations at run time, which QuaRot has inside attention and MLP, are not part of this.
"""

from calib.rotation.rewrite import check_rotation, write_rotated

__all__ = ["check_rotation", "write_rotated"]
