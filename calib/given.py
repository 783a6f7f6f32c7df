"""INT4 weights that came with a model: codes and scales that a policy takes as they are.

`given.json` names the layers and what the checkpoint says of their inputs; `given.safetensors` beside it holds the
arrays, named and shaped as in `fptq_export.policy`. Both lie in the directory of the dequantized model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from safetensors import safe_open

from calib.equalize import closed_form_scale
from calib.rule import RULE_REASON_START, float_layer, tier_from_absmax
from fptq_export.errors import UserError
from fptq_export.policy import Activation, LayerPolicy, Rule
from fptq_export.sites import Linear

__all__ = ["GIVEN_ARRAYS", "GIVEN_INDEX", "Given", "GivenActivation", "GivenLayer", "GivenWeights"]

GIVEN_INDEX = "given.json"
GIVEN_ARRAYS = "given.safetensors"
GivenActivation = Literal["static", "per_token"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GivenLayer(_Model):
    """One linear whose INT4 codes are given."""

    group_size: PositiveInt
    signed_scales: bool = False
    activation: GivenActivation | None = None
    """What the checkpoint says of the input; None leaves it to the rule."""
    activation_scale: PositiveFloat | None = None
    """INT8 scale of the input, `static` only."""
    note: str = ""
    """What could not be taken over as it was."""


class Given(_Model):
    """`given.json`."""

    schema_version: Literal[1] = 1
    format: str
    """`compressed-tensors`, `gptq` or `awq`."""
    sources: dict[str, str]
    """File of the quantized checkpoint -> SHA-256."""
    layers: dict[str, GivenLayer]


class GivenWeights:
    """The given layers of a checkpoint, with their arrays read one at a time.

    Args:
        index: `given.json`, read.
        arrays: Path of `given.safetensors`.
    """

    def __init__(self, index: Given, arrays: Path) -> None:
        self.format = index.format
        self.layers = index.layers
        self.path = arrays

    def read(self, path: str) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """Codes and scales of a layer: uint8 [out, in/2], packed along `in`, and float16 [out, in/group_size].

        Raises:
            UserError: The checkpoint holds no codes for the layer.
        """
        if path not in self.layers:
            raise UserError(
                f"layer {path}", f"the {self.format} checkpoint holds no INT4 codes for it", "choose a weight method"
            )
        with safe_open(str(self.path), framework="np") as file:
            arrays: Any = file
            return arrays.get_tensor(f"{path}.weight_codes"), arrays.get_tensor(f"{path}.weight_scales")

    def layer_policy(self, linear: Linear, absmax: float, rule: Rule) -> LayerPolicy:
        """What a linear of the checkpoint runs.

        Codes belong to the weight as it is, and equalization would change it: where the rule would equalize, the layer
        is quantized token by token. A layer without codes stays float.

        Args:
            linear: The linear.
            absmax: v, the largest magnitude of its input.
            rule: Thresholds, for layers whose activation the checkpoint leaves open.
        """
        layer = self.layers.get(linear.path)
        if layer is None:
            reason = f"the {self.format} checkpoint holds no INT4 codes for it: keeps the float precision"
            return float_layer(linear, reason)
        activation, scale, reason = self._activation(layer, linear, absmax, rule)
        return LayerPolicy(
            precision="w4a8",
            activation=activation,
            reason=reason + (f"; {layer.note}" if layer.note else ""),
            in_features=linear.in_features,
            out_features=linear.out_features,
            input_absmax=absmax,
            activation_scale=scale,
            group_size=layer.group_size,
            weight_method="given",
            signed_scales=layer.signed_scales,
            site=linear.site,
        )

    def _activation(
        self, layer: GivenLayer, linear: Linear, absmax: float, rule: Rule
    ) -> tuple[Activation, float | None, str]:
        if layer.activation is not None:
            return layer.activation, layer.activation_scale, f"{layer.activation} in the {self.format} checkpoint"
        tier, reason = tier_from_absmax(absmax, rule, linear)
        if tier == "lae_static":
            measured = f"{RULE_REASON_START} {absmax:.6g} between v0 {rule.v0:g} and v1 {rule.v1:g}"
            reason = f"{measured}, but equalization would change the given codes: one INT8 scale a token"
            return "per_token", None, reason
        return tier, None if tier == "per_token" else closed_form_scale(absmax, equalized=False), reason
