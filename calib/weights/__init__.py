"""INT4 weight quantization, one method a file, all with one signature: `WeightProblem` -> `QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Mapping

from calib.weights.adaround import quantize_adaround
from calib.weights.clip import quantize_clip
from calib.weights.coordinate_descent import quantize_gptq_cd
from calib.weights.gptq import quantize_gptq
from calib.weights.integer_scale import quantize_integer_scale
from calib.weights.mse import quantize_mse
from calib.weights.problem import QuantizedWeight, WeightMethodEntry, WeightProblem
from calib.weights.rtn import quantize_rtn
from calib.weights.two_level import quantize_two_level
from fptq_export.policy import WeightMethod

__all__ = ["WEIGHT_METHODS", "QuantizedWeight", "WeightProblem"]

WEIGHT_METHODS: Mapping[WeightMethod, WeightMethodEntry] = {
    "rtn": WeightMethodEntry(quantize_rtn),
    "mse": WeightMethodEntry(quantize_mse),
    "clip": WeightMethodEntry(quantize_clip, needs_hessian=True),
    "gptq": WeightMethodEntry(quantize_gptq, needs_hessian=True),
    "gptq+cd": WeightMethodEntry(quantize_gptq_cd, needs_hessian=True),
    "adaround": WeightMethodEntry(quantize_adaround, needs_hessian=True),
    "two_level": WeightMethodEntry(quantize_two_level, needs_hessian=True),
    "integer_scale": WeightMethodEntry(quantize_integer_scale, needs_hessian=True),
}
"""By the name that `--weight-method` and `policy.json` use."""
