"""A torch model that computes what its policy says: for ablations, and as the reference of tests.

Every linear follows the numeric contract of `fptq_export.numerics`: activation codes and INT4 codes times group scales
are multiplied as float32, in which both are exact, then come the activation scale, the bias, and one rounding to the
type of the model. Only the order of the float32 sum differs from the exact integer sums of the contract. INT8 codes
times their scale are rounded to float32 once more.

Where a norm produces the equalized tensor, consumers divide it by s themselves; the exported graph folds s into the
norm weight, which differs by the rounding of that weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from calib.equalize import LinearScales, equalized_weight, scales_from_sites
from calib.linears import weight_from_linear
from fptq_export.numerics import INT8_MAX, INT8_MIN, PER_TOKEN_EPS
from fptq_export.packing import int4_from_packed
from fptq_export.policy import LayerPolicy, Policy
from fptq_export.sites import Sites

__all__ = [
    "FakeQuantLinear",
    "WeightPrecision",
    "applied_policy",
    "apply_policy",
    "quantize_per_token",
    "quantize_static",
]

WeightPrecision = Literal["int4", "float"]
Arrays = Mapping[str, NDArray[Any]]


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """INT8 codes clip(rint(x / scale), -128, 127) as float32, ties to even; x and scale float32, shape kept."""
    return (x / scale).round_().clamp_(INT8_MIN, INT8_MAX)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 codes of each token and its scale max(max|x|, eps) / 127, float32: [..., in] -> [..., in], [..., 1]."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=float(PER_TOKEN_EPS)) / INT8_MAX
    return quantize_static(x, scale), scale


class FakeQuantLinear(nn.Module):
    """One linear as its policy runs it.

    Args:
        weight: float32 [out, in]: the equalized weight, or INT4 codes times group scales.
        bias: float32 [out] or None.
        activation: `static` (needs `scale`), `per_token`, or None for an input that stays float.
        scale: float32 scalar.
        divisor: float32 [in]; the input is divided by it first. None where the producer already did.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        activation: Literal["static", "per_token"] | None,
        scale: float | None = None,
        divisor: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale: torch.Tensor | None
        self.divisor: torch.Tensor | None
        self.register_buffer("scale", None if scale is None else torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("divisor", divisor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the type of x."""
        values = x.to(torch.float32)
        if self.divisor is not None:
            values = values / self.divisor
        if self.activation is None:
            return F.linear(values, self.weight, self.bias).to(x.dtype)
        if self.activation == "per_token":
            codes, scale = quantize_per_token(values)
        elif self.scale is not None:
            codes, scale = quantize_static(values, self.scale), self.scale
        else:
            raise RuntimeError("a static activation needs a scale")
        y = F.linear(codes, self.weight) * scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def apply_policy(
    model: nn.Module,
    policy: Policy,
    arrays: Arrays,
    sites: Sites,
    *,
    weights: WeightPrecision = "int4",
    quantize_activations: bool = True,
    prefix: str = "",
) -> dict[str, nn.Module]:
    """Replace every linear that the policy touches, in place.

    Args:
        model: The float model.
        policy: Complete.
        arrays: As `policy_arrays` made them; codes are not needed for `float` weights.
        sites: Fold sites of the policy.
        weights: `int4` takes the codes of the policy, INT8 ones too; `float` keeps the (equalized) float weights: W16.
        quantize_activations: False leaves activations float: A16, with the same weights.
        prefix: `model.layers.0.` where `model` is that block alone; arrays of its layers are enough.

    Returns:
        The linears that were replaced, by path in the whole model.
    """
    replaced: dict[str, nn.Module] = {}
    equalization = {site: arrays[f"{site}.equalization"] for site in policy.equalized_sites()}
    scales = scales_from_sites(sites, policy.equalized_sites(), equalization)
    divisors = {
        path: equalization[site_id]
        for site_id in equalization
        for path in sites.site(site_id).consumers
        if sites.site(site_id).producer_linear is None
    }
    for path, layer in policy.layers.items():
        if not path.startswith(prefix):
            continue
        touched = scales.get(path, LinearScales())
        reads_as_before = touched.input is None or path in divisors
        if layer.precision == "float" and reads_as_before and touched.output is None:
            continue
        linear = replaced[path] = model.get_submodule(path.removeprefix(prefix))
        coded = weights == "int4" and layer.precision != "float"
        weight = _weight_from_codes(path, layer, arrays) if coded else _float_weight(linear, touched)
        runs = layer.activation if quantize_activations else None
        replacement = FakeQuantLinear(
            weight,
            _bias(linear, touched),
            activation="static" if runs == "lae_static" else runs,
            scale=layer.activation_scale if runs is not None else None,
            divisor=_tensor(divisors.get(path)),
        )
        model.set_submodule(path.removeprefix(prefix), replacement)
    return replaced


@contextmanager
def applied_policy(
    model: nn.Module,
    policy: Policy,
    arrays: Arrays,
    sites: Sites,
    *,
    weights: WeightPrecision = "int4",
    quantize_activations: bool = True,
    prefix: str = "",
) -> Iterator[None]:
    """`apply_policy` inside the block; the float model again after it."""
    replaced = apply_policy(
        model, policy, arrays, sites, weights=weights, quantize_activations=quantize_activations, prefix=prefix
    )
    try:
        yield
    finally:
        for path, linear in replaced.items():
            model.set_submodule(path.removeprefix(prefix), linear)


def _weight_from_codes(path: str, layer: LayerPolicy, arrays: Arrays) -> torch.Tensor:
    """Codes times scales. INT4 is exact in float32, for 4 bits times 11 bits are 15; INT8 is rounded once."""
    if layer.precision == "w8a8":
        channel_scales = torch.from_numpy(arrays[f"{path}.weight_scales"])
        return torch.from_numpy(arrays[f"{path}.weight_codes"]).to(torch.float32) * channel_scales[:, None]
    codes = torch.from_numpy(int4_from_packed(arrays[f"{path}.weight_codes"])).to(torch.float32)
    scales = torch.from_numpy(arrays[f"{path}.weight_scales"]).to(torch.float32)
    groups = codes.reshape(layer.out_features, scales.shape[1], -1)
    return groups.mul_(scales[..., None]).reshape(codes.shape)


def _float_weight(linear: nn.Module, scales: LinearScales) -> torch.Tensor:
    return equalized_weight(weight_from_linear(linear).detach().to(torch.float32), scales)


def _bias(linear: nn.Module, scales: LinearScales) -> torch.Tensor | None:
    bias = getattr(linear, "bias", None)
    if bias is None:
        return None
    values: torch.Tensor = bias.detach().to(torch.float32)
    output = _tensor(scales.output)
    return values if output is None else values / output


def _tensor(values: NDArray[np.float32] | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values)
