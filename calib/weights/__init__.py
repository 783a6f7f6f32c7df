"""INT4 weight quantization, one method a file, all with one signature: `WeightProblem` -> `QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Mapping

from calib.weights.gptq import quantize_gptq
from calib.weights.mse import quantize_mse
from calib.weights.problem import QuantizedWeight, WeightMethodEntry, WeightProblem
from calib.weights.rtn import quantize_rtn
from fptq_export.policy import WeightMethod

__all__ = ["WEIGHT_METHODS", "QuantizedWeight", "WeightProblem"]

WEIGHT_METHODS: Mapping[WeightMethod, WeightMethodEntry] = {
    "rtn": WeightMethodEntry(quantize_rtn),
    "mse": WeightMethodEntry(quantize_mse),
    "gptq": WeightMethodEntry(quantize_gptq, needs_hessian=True),
}
"""By the name that `--weight-method` and `policy.json` use."""
