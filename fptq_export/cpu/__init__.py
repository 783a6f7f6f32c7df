"""The W4A8 linear of the numeric contract on the CPU, fast: what `numerics` says, with AVX-512 VNNI or AVX2.

The arithmetic is C++ (plugins/cpu), built by `python -m fptq_export.cpu build`. Importing this package needs no build;
the first call without one raises a `UserError` that names the command.
"""

from __future__ import annotations

from fptq_export.cpu.instruction_set import InstructionSet, available_instruction_sets
from fptq_export.cpu.linear import group_sums, quantize_activation, w4a8_linear
from fptq_export.cpu.packed_weight import PackedWeight, packed_weight_from_codes

__all__ = [
    "InstructionSet",
    "PackedWeight",
    "available_instruction_sets",
    "group_sums",
    "packed_weight_from_codes",
    "quantize_activation",
    "w4a8_linear",
]
