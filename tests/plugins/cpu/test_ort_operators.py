"""The operators of domain `fptq.cpu` in ONNX Runtime: the bits of the kernels, and refusals with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fptq_export import cpu
from fptq_export.cpu import packed_weight_from_codes
from fptq_export.rewrite.functions import W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.lower_to_cpu import CPU_DOMAIN, HALF_LINEAR
from tests.support.ort_operators import Initializers, initializers, session_of
from tests.support.w4a8_cases import FP32_UNIT_ROUNDOFF, assert_same_bits, assert_within, make_case

X_SCALE = 0.05


def w4a8_node(x_scale: float | None, weights: list[str], group_size: int) -> tuple[onnx.NodeProto, Initializers]:
    """A node that multiplies with these weights, and its activation scale."""
    scale = {} if x_scale is None else {"x_scale": numpy_helper.from_array(np.array(x_scale, np.float32), "x_scale")}
    inputs = ["x", *scale, *(f"{name}_{part}" for name in weights for part in ("codes", "scales"))]
    op_type = W4A8_PER_TOKEN if x_scale is None else W4A8_STATIC
    outputs = [f"{name}_y" for name in weights]
    return helper.make_node(op_type, inputs, outputs, domain=CPU_DOMAIN, group_size=group_size), scale


@pytest.mark.parametrize("x_scale", [None, X_SCALE])
@pytest.mark.parametrize("shape", [(1, 33, 576, 64), (5, 64, 128, 128), (40, 70, 96, 96), (3, 31, 64, 16)], ids=str)
@pytest.mark.usefixtures("operators_instruction_set")
def test_every_weight_gets_the_bits_of_the_kernel(shape: tuple[int, int, int, int], x_scale: float | None) -> None:
    """A node with three weights of other widths: each output is that of the kernel alone, on one thread and two."""
    tokens, out, channels, group_size = shape
    cases = {name: make_case(tokens, width, channels, group_size) for name, width in (("a", out), ("b", 8), ("c", 65))}
    x = cases["a"].x
    node, constants = w4a8_node(x_scale, list(cases), group_size)
    for name, case in cases.items():
        constants |= initializers(case, name)
    weights = [packed_weight_from_codes(case.w_codes, case.w_scale, group_size) for case in cases.values()]
    expected = [cpu.w4a8_linear(x, weight, x_scale) for weight in weights]
    for threads in (1, 2):
        found = session_of(node, constants, ["tokens", channels], threads).run(None, {"x": x})
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other, f"{threads} threads")


def test_leading_axes_stay() -> None:
    """[batch, tokens, in] gives [batch, tokens, out], and no token gives none."""
    case = make_case(6, 40, 64, 32)
    node, constants = w4a8_node(X_SCALE, ["a"], 32)
    session = session_of(node, constants | initializers(case, "a"), ["batch", "tokens", 64])
    flat = cpu.w4a8_linear(case.x, packed_weight_from_codes(case.w_codes, case.w_scale, 32), X_SCALE)
    (y,) = session.run(None, {"x": case.x.reshape(2, 3, 64)})
    assert_same_bits(y, flat.reshape(2, 3, 40), "batch of two")
    (empty,) = session.run(None, {"x": np.zeros((2, 0, 64), np.float32)})
    assert empty.shape == (2, 0, 40)


def half_linear(weight: NDArray[np.float16], x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
    """`FptqHalfLinear` in ONNX Runtime; a weight whose columns lie side by side is handed over transposed."""
    inputs_first = int(not weight.flags.c_contiguous)
    node = helper.make_node(HALF_LINEAR, ["x", "w"], ["y"], domain=CPU_DOMAIN, inputs_first=inputs_first)
    constants = {"w": numpy_helper.from_array(weight.T if inputs_first else weight, "w")}
    y: NDArray[np.float32] = session_of(node, constants, ["tokens", weight.shape[1]], threads).run(None, {"x": x})[0]
    return y


@pytest.mark.parametrize(("tokens", "out", "channels"), [(1, 33, 576), (6, 70, 100), (2, 5, 3)])
@pytest.mark.usefixtures("operators_instruction_set")
def test_head_is_within_the_roundings_of_fp32(tokens: int, out: int, channels: int) -> None:
    """A sum of k products in any order is off by up to k u / (1 - k u) of its magnitudes (Higham, lemma 3.1)."""
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((tokens, channels)).astype(np.float32)
    weight = rng.standard_normal((out, channels)).astype(np.float16)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    share = channels * FP32_UNIT_ROUNDOFF / (1 - channels * FP32_UNIT_ROUNDOFF)
    assert_within(half_linear(weight, x), exact, share * (np.abs(x) @ np.abs(weight.astype(np.float64)).T))


@pytest.mark.usefixtures("operators_instruction_set")
def test_head_of_a_token_does_not_depend_on_the_others() -> None:
    """A row alone has the bits that it has in a batch, on one thread and on two."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((6, 72)).astype(np.float32), rng.standard_normal((90, 72)).astype(np.float16)
    whole = half_linear(weight, x, threads=2)
    for row in range(len(x)):
        assert_same_bits(whole[row : row + 1], half_linear(weight, x[row : row + 1]), f"row {row}")


def test_head_may_have_its_inputs_first() -> None:
    """[in, out] gives the bits of [out, in]."""
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((3, 50)).astype(np.float32), rng.standard_normal((41, 50)).astype(np.float16)
    assert_same_bits(half_linear(np.asfortranarray(weight), x), half_linear(weight, x), "inputs first")


@pytest.mark.parametrize(
    ("group_size", "changes", "reason"),
    [
        (48, {"a_scales": np.ones((2, 40), np.float16)}, "status"),
        (0, {}, "group_size does not fit"),
        (32, {"a_scales": np.ones((2, 40), np.float16)}, "codes and scales do not fit"),
        (32, {"x_scale": np.ones(1, np.float16)}, "(?i)type"),
    ],
    ids=["group_size", "no_group_size", "scales", "type_of_the_scale"],
)
def test_what_does_not_fit_is_refused(group_size: int, changes: dict[str, NDArray[Any]], reason: str) -> None:
    """When the session is made, with the cause."""
    node, constants = w4a8_node(X_SCALE, ["a"], group_size)
    constants |= initializers(make_case(2, 40, 96, 32), "a")
    constants |= {name: numpy_helper.from_array(array, name) for name, array in changes.items()}
    with pytest.raises(Exception, match=reason):  # ONNX Runtime's errors share no base class
        session_of(node, constants, ["tokens", 96])


def test_weight_without_scales_is_refused() -> None:
    """The number of inputs is odd."""
    node, constants = w4a8_node(X_SCALE, ["a", "b"], 32)
    for name in ("a", "b"):
        constants |= initializers(make_case(2, 40, 96, 32), name)
    del node.input[-1]
    with pytest.raises(Exception, match="a weight is incomplete"):  # ONNX Runtime's errors share no base class
        session_of(node, constants, ["tokens", 96])


def test_weight_that_is_no_constant_is_refused() -> None:
    """The kernel reads it once, when the session is made."""
    case = make_case(2, 40, 64, 32)
    node, constants = w4a8_node(X_SCALE, ["a"], 32)
    constants |= initializers(case, "a")
    del constants["a_scales"]
    with pytest.raises(Exception, match="is not a constant"):  # ONNX Runtime's errors share no base class
        session_of(node, constants, ["tokens", 64], a_scales=TensorProto.FLOAT16)


def test_activation_of_another_width_is_refused() -> None:
    """At the call, because only then it is known."""
    case = make_case(2, 40, 64, 32)
    node, constants = w4a8_node(None, ["a"], 32)
    session = session_of(node, constants | initializers(case, "a"), ["tokens", "channels"])
    with pytest.raises(Exception, match="does not have 64 channels"):  # ONNX Runtime's errors share no base class
        session.run(None, {"x": np.zeros((2, 32), np.float32)})
