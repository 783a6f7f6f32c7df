"""Is the weight of a graph the one that belongs there? If not, what was done to it?

Two questions, because either file may be wrong. Are codes, group scales and INT8 scale those of the policy, bit for
bit? And do they stand for the float weight times its fold scales? The second one needs no threshold: each known fault
is a hypothesis, and it is reported where the float weight lies nearer to what the fault makes of the codes than to what
the graph holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.equalize import LinearScales
from fptq_export.debug.figures import Real, power
from fptq_export.debug.graph_linears import GraphLinear, GraphWeight
from fptq_export.debug.report import Fault
from fptq_export.packing import int4_from_packed
from fptq_export.policy import PolicyArrays

__all__ = ["FloatWeight", "policy_faults", "weight_faults"]

_CLEARLY = 0.8
"""A fault must leave less than this share of the error to be reported. Shifted scales of 64 Gaussian weights, the
faintest fault known here, leave a half: their maxima differ by 15 %, which adds 0.15^2 of a weight's power to the
0.012 of INT4 rounding. Right codes are below no share of a wrong hypothesis, so nothing is lost by asking for more."""


@dataclass(frozen=True)
class FloatWeight:
    """The float weight of a linear and how its fold sites change it."""

    weight: Real
    """[in, out], as the float model has it."""
    input: Real
    """[in]: rows are multiplied by it; ones where nothing is folded."""
    output: Real
    """[out]: columns are divided by it; ones where nothing is folded."""

    @classmethod
    def folded(cls, weight: Real, scales: LinearScales) -> FloatWeight:
        """From a weight [out, in] and what equalization does to it."""
        rows, columns = weight.T.shape
        one_in, one_out = np.ones(rows, np.float32), np.ones(columns, np.float32)
        return cls(
            np.ascontiguousarray(weight.T),
            one_in if scales.input is None else scales.input,
            one_out if scales.output is None else scales.output,
        )

    @property
    def wanted(self) -> Real:
        """What the graph should multiply by, float32 [in, out]."""
        return self.weight * self.input[:, None] / self.output


def policy_faults(linear: GraphLinear, weight: GraphWeight, arrays: PolicyArrays) -> Iterator[Fault]:
    """What differs between graph and policy."""
    layer = linear.layer
    stored = arrays.read(f"{linear.path}.weight_codes")
    codes: NDArray[Any] = stored if layer.precision == "w8a8" else int4_from_packed(stored)
    wrong = int((weight.codes != codes.T).sum())
    if wrong:
        cause = f"{wrong:,} of {codes.size:,} codes are not those of policy.safetensors"
        yield Fault(kind="codes", message=f"{cause}{_example(codes.T, weight.codes)}")
    scales = np.atleast_2d(arrays.read(f"{linear.path}.weight_scales").T.astype(np.float32))
    wrong = int((scales != weight.scales).sum())
    if wrong:
        cause = f"{wrong:,} of {scales.size:,} scales are not those of policy.safetensors"
        yield Fault(kind="group_scales", message=cause)
    scale, wanted = linear.activation_scale(), layer.activation_scale
    if scale is not None and wanted is not None and scale != float(np.float32(wanted)):
        yield Fault(kind="activation_scale", message=f"the INT8 scale is {scale:g}, and {wanted:g} in policy.json")


def _example(wanted: NDArray[Any], found: NDArray[Any]) -> str:
    row, column = (int(index[0]) for index in np.nonzero(wanted != found))
    return f" (first at input {row}, output {column}: {found[row, column]} for {wanted[row, column]})"


def weight_faults(weight: GraphWeight, wanted: FloatWeight, site: str | None) -> Iterator[Fault]:
    """Faults that explain the weight better than what it should be.

    Args:
        weight: Of the graph.
        wanted: What it should be.
        site: Fold site of the input, where that is equalized.
    """
    target = wanted.wanted
    dequantized = weight.dequantized()
    limit = _CLEARLY * power(dequantized - target)
    if site is not None:
        if power(dequantized - target / wanted.input[:, None]) < limit:
            yield Fault(kind="fold", message=f"the weight lacks the scale of {site}, by which its input is divided")
        if power(dequantized - target * wanted.input[:, None]) < limit:
            yield Fault(kind="fold", message=f"the weight has the scale of {site} twice")
    swaps = {"input": _swapped_pairs(weight.codes, 0), "output": _swapped_pairs(weight.codes, 1)}
    for axis, codes in swaps.items():
        if codes is not None and power(weight.dequantized(codes) - target) < limit:
            message = f"codes of neighbouring {axis} channels are swapped: the nibbles of each byte"
            yield Fault(kind="codes", message=message)
    for shift in (-1, 1) if len(weight.scales) > 1 else ():
        if power(weight.dequantized(shift=-shift) - target) < limit:
            place = "next" if shift < 0 else "previous"
            message = f"each group has the scale of the {place} one"
            yield Fault(kind="group_scales", message=message)


def _swapped_pairs(codes: NDArray[np.int8], axis: int) -> NDArray[np.int8] | None:
    if codes.shape[axis] % 2:
        return None
    pairs = codes.reshape(*codes.shape[:axis], -1, 2, *codes.shape[axis + 1 :])
    return np.flip(pairs, axis + 1).reshape(codes.shape)
