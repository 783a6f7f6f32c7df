from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fptq_export import cpu
from fptq_export.cpu import InstructionSet, instruction_set, packed_weight_from_codes
from fptq_export.cpu.extension import aligned_bytes, load_extension
from fptq_export.cpu.packed_weight import MAX_CHANNEL_GROUP
from fptq_export.errors import UserError

CODES = np.zeros((4, 256), dtype=np.int8)
SCALE = np.ones((4, 2), dtype=np.float16)
X = np.ones((2, 256), dtype=np.float32)


@pytest.mark.parametrize(
    ("codes", "scale", "group_size", "message"),
    [
        (CODES + 8, SCALE, 128, r"integers in \[-8, 7\]"),
        (CODES - 9, SCALE, 128, r"integers in \[-8, 7\]"),
        (CODES.astype(np.float32), SCALE, 128, "must be integers"),
        (CODES[0], SCALE, 128, "must be .out, in."),
        (CODES[:0], SCALE[:0], 128, "not empty"),
        (CODES, SCALE, 100, "group_size must be one of"),
        (CODES, SCALE, 0, "group_size must be one of"),
        (CODES[:, :96], SCALE[:, :1], 64, "divide in"),
        (CODES, SCALE[:, :1], 128, r"float16 \(4, 2\)"),
        (CODES, SCALE.astype(np.float32), 128, "must be float16"),
        (CODES, SCALE * np.float16(np.nan), 128, "not finite"),
        (
            np.zeros((1, MAX_CHANNEL_GROUP + 1), dtype=np.int8),
            SCALE[:1, :1],
            MAX_CHANNEL_GROUP + 1,
            "overflows INT32",
        ),
    ],
)
def test_weight_that_does_not_fit_is_refused(codes: Any, scale: Any, group_size: int, message: str) -> None:
    """Wrong codes, shapes, types and group sizes raise before anything is packed."""
    with pytest.raises(ValueError, match=message):
        packed_weight_from_codes(codes, scale, group_size)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X[:, :128]}, "128 input channels, the weight 256"),
        ({"x": X.astype(np.float64)}, "float32 or float16"),
        ({"x": X[0]}, "tokens, in"),
        ({"x": X[:0]}, "not empty"),
        ({"x_scale": 0.0}, "positive and finite"),
        ({"x_scale": -1.0}, "positive and finite"),
        ({"x_scale": float("nan")}, "positive and finite"),
        ({"x_scale": float("inf")}, "positive and finite"),
        ({"bias": np.zeros(3, dtype=np.float32)}, r"bias must be float32 or float16 \(4,\)"),
        ({"bias": np.zeros(4, dtype=np.int32)}, "bias must be"),
        ({"output_type": np.float64}, "output_type must be"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_call_that_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    """Each argument of the linear is checked, and the message gives the value."""
    arguments: dict[str, Any] = {"x": X, "weight": packed_weight_from_codes(CODES, SCALE, 128)} | changed
    with pytest.raises(ValueError, match=message):
        cpu.w4a8_linear(**arguments)


def test_instruction_set_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced instruction set never turns into another one in silence."""
    monkeypatch.setattr(instruction_set, "_native_values", lambda: {InstructionSet.SCALAR: None})
    with pytest.raises(UserError, match="avx512_vnni: this machine does not run it\n  -> choose one of: scalar"):
        cpu.quantize_activation(X, instruction_set=InstructionSet.AVX512_VNNI)


def test_packed_weight_cannot_be_changed() -> None:
    """Threads may share a packed weight because nobody can write to it."""
    weight = packed_weight_from_codes(CODES, SCALE, 128)
    with pytest.raises(ValueError, match="read-only"):
        weight.codes[0] = 1


@pytest.mark.parametrize(
    ("buffer", "wrong", "message"),
    [
        ("x", np.zeros((2, 255), dtype=np.float32), "x holds 2040 bytes, the problem needs 2048"),
        ("packed_codes", aligned_bytes(100), "packed_codes holds 100 bytes"),
        ("packed_scales", aligned_bytes(8), "packed_scales holds 8 bytes"),
        ("bias", np.zeros(5, dtype=np.float32), "bias holds 20 bytes, the problem needs 16"),
        ("y", np.zeros((2, 3), dtype=np.float32), "y holds 24 bytes, the problem needs 32"),
        ("workspace", aligned_bytes(64), "status 6"),
        ("workspace", aligned_bytes(4097)[1:], "status 4"),
        ("packed_codes", aligned_bytes(32 * 128 + 1)[1:], "status 4"),
        ("threads", 0, "status 2"),
    ],
)
def test_binding_never_reads_past_a_buffer(buffer: str, wrong: Any, message: str) -> None:
    """The compiled module checks sizes and alignment itself: a wrong caller gets an error, not a crash."""
    extension, weight = load_extension(), packed_weight_from_codes(CODES, SCALE, 128)
    problem = extension.make_problem(2, 4, 256, 128, half_input=False, half_output=False)
    arguments: dict[str, Any] = {
        "problem": problem,
        "instruction_set": extension.InstructionSet.SCALAR,
        "threads": 1,
        "x": X,
        "x_scale": None,
        "packed_codes": weight.codes,
        "packed_scales": weight.scales,
        "bias": None,
        "workspace": aligned_bytes(problem.workspace_bytes()),
        "y": np.empty((2, 4), dtype=np.float32),
    }
    extension.linear(**arguments)
    with pytest.raises(ValueError, match=message):
        extension.linear(**arguments | {buffer: wrong})


@pytest.mark.parametrize(
    ("sizes", "status"),
    [
        ((0, 4, 256, 128), 2),
        ((2, 0, 256, 128), 2),
        ((2, 4, 200, 128), 2),
        ((2, 4, 256, 100), 3),
        ((2, 4, 256, -128), 3),
    ],
)
def test_kernels_refuse_sizes_by_status(sizes: tuple[int, int, int, int], status: int) -> None:
    """The C boundary checks every size itself."""
    extension = load_extension()
    problem = extension.make_problem(*sizes, half_input=False, half_output=False)
    x = np.empty((sizes[0], sizes[2]), dtype=np.float32)
    with pytest.raises(ValueError, match=f"status {status}"):
        extension.quantize_activation(
            problem,
            extension.InstructionSet.SCALAR,
            1,
            x,
            None,
            aligned_bytes(65536),
            np.empty(x.shape, dtype=np.int8),
            np.empty((sizes[0], 1), dtype=np.float32),
        )
