"""INT4 weight quantization, one method a file, all with one signature.

A method takes (weight float32 [out, in], group_size) and gives (codes int8 [out, in] in [-8, 7], scales float16
[out, in/group_size]). `group_size` divides `in`. A scale that float16 cannot hold comes out as inf: callers know the
name of the layer and refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from calib.weights.mse import quantize_mse
from calib.weights.rtn import quantize_rtn
from fptq_export.policy import WeightMethod

__all__ = ["WEIGHT_METHODS", "QuantizeWeight"]

QuantizeWeight = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

WEIGHT_METHODS: Mapping[WeightMethod, QuantizeWeight] = {"rtn": quantize_rtn, "mse": quantize_mse}
"""By the name that `--weight-method` and `policy.json` use."""
