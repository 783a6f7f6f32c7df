"""Quantize an activation and multiply it with a packed weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fptq_export.cpu.extension import Extension, Problem, aligned_bytes, load_extension
from fptq_export.cpu.instruction_set import InstructionSet, native_from_instruction_set
from fptq_export.cpu.packed_weight import PackedWeight, native_group_size

__all__ = ["group_sums", "quantize_activation", "w4a8_linear"]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


def quantize_activation(
    x: NDArray[np.floating],
    x_scale: float | None = None,
    *,
    instruction_set: InstructionSet | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """INT8 codes and scales of an activation: `numerics.quantize_activation` and `numerics.per_token_scale`.

    Args:
        x: float32 or float16, [tokens, in], in up to 524288.
        x_scale: Scale of the whole tensor, positive; None gives each token its own.
        instruction_set: None takes the fastest of this machine.
        threads: Most threads to use.

    Returns:
        int8 codes [tokens, in], float32 scales [tokens, 1]. Per token, the scale of a row that is not finite is not
        finite either; with `x_scale`, infinities are clipped and a NaN becomes -128.

    Raises:
        ValueError: A shape, type or value does not fit.
        UserError: The C++ part is not built, or the machine lacks the instruction set.
    """
    x = _checked_activation(x)
    tokens, channels = x.shape
    scale = _checked_scale(x_scale)
    _check_threads(threads)
    extension = load_extension()
    # Codes need no weight: a problem of one output channel and one group.
    problem = extension.make_problem(tokens, 1, channels, 0, half_input=_is_half(x.dtype), half_output=False)
    codes = np.empty((tokens, channels), dtype=np.int8)
    scales = np.empty((tokens, 1), dtype=np.float32)
    native = native_from_instruction_set(instruction_set)
    extension.quantize_activation(problem, native, threads, x, scale, _workspace(problem), codes, scales)
    return codes, scales


def group_sums(
    x: NDArray[np.floating],
    weight: PackedWeight,
    x_scale: float | None = None,
    *,
    instruction_set: InstructionSet | None = None,
    threads: int = 1,
) -> NDArray[np.int32]:
    """The exact integer sums inside each group, as `w4a8_linear` computes them; arguments and errors as there.

    Returns:
        int32, [tokens, out, in/group_size].
    """
    extension, problem, x = _prepare(x, weight, np.dtype(np.float32), threads)
    groups = weight.in_channels // weight.group_size
    sums = np.empty((x.shape[0], groups, weight.out_channels), dtype=np.int32)
    native = native_from_instruction_set(instruction_set)
    extension.group_sums(
        problem, native, threads, x, _checked_scale(x_scale), weight.codes, weight.scales, _workspace(problem), sums
    )
    return sums.transpose(0, 2, 1)


def w4a8_linear(
    x: NDArray[np.floating],
    weight: PackedWeight,
    x_scale: float | None = None,
    bias: NDArray[np.floating] | None = None,
    *,
    output_type: DTypeLike = np.float32,
    instruction_set: InstructionSet | None = None,
    threads: int = 1,
) -> NDArray[Any]:
    """The W4A8 linear of the numeric contract, activation quantization included.

    The FP32 sum runs over the groups in order, so the bits depend neither on the instruction set, nor on the number of
    threads, nor on the other rows of `x`.

    Args:
        x: float32 or float16, [tokens, in].
        weight: From `packed_weight_from_codes`.
        x_scale: Static scale of `x`, positive; None gives each token its own.
        bias: float32 or float16, [out], or None.
        output_type: float32 or float16.
        instruction_set: None takes the fastest of this machine.
        threads: Most threads to use.

    Returns:
        [tokens, out] of `output_type`.

    Raises:
        ValueError: A shape, type or value does not fit.
        UserError: The C++ part is not built, or the machine lacks the instruction set.
    """
    output = np.dtype(output_type)
    extension, problem, x = _prepare(x, weight, output, threads)
    y = np.empty((x.shape[0], weight.out_channels), dtype=output)
    extension.linear(
        problem,
        native_from_instruction_set(instruction_set),
        threads,
        x,
        _checked_scale(x_scale),
        weight.codes,
        weight.scales,
        _checked_bias(bias, weight.out_channels),
        _workspace(problem),
        y,
    )
    return y


def _prepare(
    x: NDArray[np.floating], weight: PackedWeight, output: np.dtype[Any], threads: int
) -> tuple[Extension, Problem, NDArray[np.floating]]:
    if output not in _FLOATS:
        raise ValueError(f"output_type must be float32 or float16, got {output}")
    _check_threads(threads)
    x = _checked_activation(x)
    tokens, channels = x.shape
    if channels != weight.in_channels:
        raise ValueError(f"x has {channels} input channels, the weight {weight.in_channels}")
    extension = load_extension()
    native = native_group_size(weight.group_size, weight.in_channels)
    problem = extension.make_problem(
        tokens, weight.out_channels, channels, native, half_input=_is_half(x.dtype), half_output=_is_half(output)
    )
    return extension, problem, x


def _checked_activation(x: NDArray[np.floating]) -> NDArray[np.floating]:
    if x.dtype not in _FLOATS or x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must be float32 or float16 [tokens, in] and not empty, got {x.dtype} {x.shape}")
    return np.ascontiguousarray(x)


def _checked_scale(x_scale: float | None) -> float | None:
    if x_scale is None:
        return None
    scale = float(np.float32(x_scale))
    if not (math.isfinite(scale) and scale > 0.0):
        raise ValueError(f"x_scale must be positive and finite in float32, got {x_scale}")
    return scale


def _checked_bias(bias: NDArray[np.floating] | None, out_channels: int) -> NDArray[np.float32] | None:
    if bias is None:
        return None
    if bias.dtype not in _FLOATS or bias.shape != (out_channels,):
        raise ValueError(f"bias must be float32 or float16 {(out_channels,)}, got {bias.dtype} {bias.shape}")
    return np.ascontiguousarray(bias, dtype=np.float32)


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def _is_half(dtype: np.dtype[Any]) -> bool:
    return dtype == np.float16


def _workspace(problem: Problem) -> NDArray[np.uint8]:
    return aligned_bytes(problem.workspace_bytes())
