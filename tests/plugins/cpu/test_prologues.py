"""W4A8 operators that make what they quantize, a norm or a gate: within FP32's roundings, then the kernel's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from fptq_export import cpu
from fptq_export.cpu import packed_weight_from_codes
from fptq_export.rewrite.functions import W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.fuse_prologue import SKIP_NORM, SWI_GLU
from fptq_export.rewrite.lower_to_cpu import CPU_DOMAIN
from tests.support.ort_operators import Initializers, initializers, session_of
from tests.support.w4a8_cases import EXP_ROUNDINGS, FP32_UNIT_ROUNDOFF, Case, assert_same_bits, assert_within, make_case

SILU_ROUNDINGS = 2 * EXP_ROUNDINGS + 5
"""Of e^-|gate| above and below the line, and one each of the product above, the sum below, the quotient and the product
with `up`; one to spare for their products."""
SCALE_ROUNDINGS = 3
"""Of a code times its scale: the scale, the quotient that is rounded to the code, the product."""
EPSILON = 0.5
"""Large enough to be seen beside a mean of squares of some ten."""
GROUP_SIZE = 32


def echo_case(rows: int, channels: int) -> Case:
    """A weight that gives back what was quantized: ones on the diagonal."""
    case = make_case(rows, channels, channels, GROUP_SIZE)
    ones = np.ones_like(case.w_scale)
    return Case(case.x, np.eye(channels, dtype=np.int8), ones, case.bias, GROUP_SIZE)


def node_of(
    prologue: str, x_scale: float | None, case: Case, outputs: list[str], **attributes: Any
) -> tuple[onnx.NodeProto, Initializers]:
    """A node with the prologue; its first inputs are x and what else the prologue reads."""
    first = ["x", *(["skip", "gamma"] if prologue == SKIP_NORM else ["up"])]
    constants = initializers(case, "a")
    if x_scale is not None:
        constants["x_scale"] = onnx.numpy_helper.from_array(np.array(x_scale, np.float32), "x_scale")
    scale = [] if x_scale is None else ["x_scale"]
    op_type = f"{prologue}{(W4A8_PER_TOKEN if x_scale is None else W4A8_STATIC).removeprefix('Fptq')}"
    names = [*first, *scale, "a_codes", "a_scales"]
    return helper.make_node(op_type, names, outputs, domain=CPU_DOMAIN, group_size=GROUP_SIZE, **attributes), constants


def run_node(
    prologue: str, x_scale: float | None, case: Case, given: dict[str, NDArray[np.float32]], threads: int = 1
) -> list[NDArray[np.float32]]:
    """What the node gives."""
    norm = prologue == SKIP_NORM
    attributes = {"epsilon": EPSILON} if norm else {}
    node, constants = node_of(prologue, x_scale, case, ["sum", "y"] if norm else ["y"], **attributes)
    others = {name: onnx.TensorProto.FLOAT for name in given if name != "x"}
    found: list[NDArray[np.float32]] = session_of(node, constants, [None] * given["x"].ndim, threads, **others).run(
        None, given
    )
    return found


def inputs_of(prologue: str, rows: int, channels: int) -> dict[str, NDArray[np.float32]]:
    """Random inputs; gates of every second row up to where e^gate is not a number of FP32 any more."""
    rng = np.random.default_rng(channels)
    x, other = rng.standard_normal((2, rows, channels)).astype(np.float32)
    if prologue == SKIP_NORM:
        return {"x": x, "skip": 3 * other, "gamma": rng.uniform(0.5, 2.0, channels).astype(np.float32)}
    return {"x": x * np.where(np.arange(rows) % 2, 60.0, 1.0).astype(np.float32)[:, None], "up": other}


def exact(prologue: str, given: dict[str, NDArray[np.float32]]) -> tuple[NDArray[np.float64], float]:
    """What is quantized, in float64, and the relative error of FP32 (Higham, lemma 3.1)."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    if prologue == SKIP_NORM:
        # One rounding of a sum, half of those of the mean of squares, and of root, quotient and two products.
        total = wide["x"] + wide["skip"]
        mean = (total**2).mean(axis=-1, keepdims=True)
        roundings = (total.shape[-1] / 2 + 8) * FP32_UNIT_ROUNDOFF
        return total / np.sqrt(mean + EPSILON) * wide["gamma"], roundings / (1 - roundings)
    roundings = SILU_ROUNDINGS * FP32_UNIT_ROUNDOFF
    return wide["x"] / (1 + np.exp(-wide["x"])) * wide["up"], roundings / (1 - roundings)


@pytest.mark.parametrize("prologue", [SKIP_NORM, SWI_GLU])
@pytest.mark.parametrize("shape", [(1, 64), (3, 96), (40, 32)], ids=str)
@pytest.mark.usefixtures("operators_instruction_set")
def test_what_is_quantized_is_within_the_roundings_of_fp32(prologue: str, shape: tuple[int, int]) -> None:
    """Per token the largest of a row is not rounded to a code: it is seen as it is, the others to half a step."""
    given = inputs_of(prologue, *shape)
    y = run_node(prologue, None, echo_case(*shape), given)[-1]
    expected, share = exact(prologue, given)
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    float_error = (share + SCALE_ROUNDINGS * FP32_UNIT_ROUNDOFF) * largest
    step = np.where(np.abs(expected) == largest, 0.0, largest / 127 / 2)
    assert_within(y, expected, step + 2 * float_error)


@pytest.mark.parametrize("prologue", [SKIP_NORM, SWI_GLU])
def test_static_scale_is_read_behind_the_inputs_of_the_prologue(prologue: str) -> None:
    """Codes of the given scale."""
    given = inputs_of(prologue, 3, 64)
    expected, share = exact(prologue, given)
    x_scale = float(np.abs(expected).max() / 100)
    y = run_node(prologue, x_scale, echo_case(3, 64), given)[-1]
    float_error = (share + SCALE_ROUNDINGS * FP32_UNIT_ROUNDOFF) * np.abs(expected).max()
    assert_within(y, expected, np.full(expected.shape, x_scale / 2 + 2 * float_error))


@pytest.mark.parametrize("prologue", [SKIP_NORM, SWI_GLU])
@pytest.mark.usefixtures("operators_instruction_set")
def test_linear_has_the_bits_of_the_kernel_and_a_row_its_own(prologue: str) -> None:
    """The product is that of the kernel for the echoed activation; rows alone, and on two threads, are the same."""
    given = inputs_of(prologue, 40, 64)
    case = make_case(40, 33, 64, GROUP_SIZE)
    x_scale = float(np.abs(exact(prologue, given)[0]).max() / 100)
    echoed = run_node(prologue, x_scale, echo_case(40, 64), given)[-1]
    weight = packed_weight_from_codes(case.w_codes, case.w_scale, GROUP_SIZE)
    y = run_node(prologue, x_scale, case, given, threads=2)[-1]
    assert_same_bits(y, cpu.w4a8_linear(echoed, weight, x_scale), "the product")
    for row in (0, 39):
        alone = {name: array[row : row + 1] if array.ndim > 1 else array for name, array in given.items()}
        assert_same_bits(run_node(prologue, x_scale, case, alone)[-1], y[row : row + 1], f"row {row}")


def test_sum_is_an_output() -> None:
    """Of the FP32 numbers, rounded once, with all leading axes."""
    given = inputs_of(SKIP_NORM, 6, 64)
    stacked = {name: array.reshape(2, 3, 64) if array.ndim > 1 else array for name, array in given.items()}
    total, y = run_node(SKIP_NORM, None, echo_case(6, 64), stacked)
    assert_same_bits(total, stacked["x"] + stacked["skip"], "the sum")
    assert y.shape == (2, 3, 64)


@pytest.mark.parametrize("prologue", [SKIP_NORM, SWI_GLU])
def test_no_token_gives_none(prologue: str) -> None:
    """An empty batch is no error."""
    given = {name: array[:0] if array.ndim > 1 else array for name, array in inputs_of(prologue, 1, 64).items()}
    assert all(found.shape == (0, 64) for found in run_node(prologue, None, echo_case(1, 64), given))


@pytest.mark.parametrize(
    ("prologue", "name", "shape", "reason"),
    [
        (SKIP_NORM, "skip", (2, 32), "x, skip and gamma do not fit"),
        (SKIP_NORM, "gamma", (32,), "x, skip and gamma do not fit"),
        (SKIP_NORM, "x", (2, 32), "does not have 64 channels"),
        (SWI_GLU, "up", (1, 64), "gate and up do not fit"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(prologue: str, name: str, shape: tuple[int, ...], reason: str) -> None:
    """At the call, with the cause."""
    given: dict[str, Any] = inputs_of(prologue, 2, 64) | {name: np.ones(shape, np.float32)}
    with pytest.raises(Exception, match=reason):  # ONNX Runtime's errors share no base class
        run_node(prologue, None, echo_case(2, 64), given)


def test_norm_without_epsilon_is_refused() -> None:
    """There is no default that a graph could mean."""
    node, constants = node_of(SKIP_NORM, None, echo_case(1, 64), ["sum", "y"])
    others = dict.fromkeys(("skip", "gamma"), onnx.TensorProto.FLOAT)
    with pytest.raises(Exception, match="epsilon"):  # ONNX Runtime's errors share no base class
        session_of(node, constants, [1, 64], **others)
