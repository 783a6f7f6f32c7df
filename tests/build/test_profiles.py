from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fptq_export.build.profiles import (
    ExplicitShapes,
    GraphInput,
    LlmLimits,
    Profile,
    ShapeRange,
    check_profiles,
    inputs_from_onnx,
    profile_for_inputs,
    shapes_from_option,
)
from fptq_export.errors import UserError, UserErrors

DECODER = (
    GraphInput("input_ids", ("batch", "sequence")),
    GraphInput("attention_mask", ("batch", "past + sequence")),
    GraphInput("position_ids", ("batch", "sequence")),
    GraphInput("past_key_values.0.key", ("batch", 3, "past", 64)),
    GraphInput("past_key_values.0.value", ("batch", 3, "past", 64)),
)
STATIC = (
    *DECODER[:1],
    GraphInput("attention_mask", ("batch", 1152)),
    *DECODER[2:3],
    GraphInput("write_indices", ("batch",)),
    GraphInput("past_key_values.0.key", ("batch", 3, 1152, 64)),
)
"""Of a cache with a slot for every token of the limits below."""
ENCODER = (
    GraphInput("input_ids", ("N", "L")),
    GraphInput("attention_mask", ("N", "L")),
    GraphInput("token_type_ids", ("N", "L")),
)
LIMITS = LlmLimits(max_batch_size=4, max_input_len=128, max_kv_len=1024)


def profile(inputs: tuple[GraphInput, ...], explicit: ExplicitShapes | None = None) -> dict[str, ShapeRange]:
    made = profile_for_inputs(inputs, LIMITS, explicit)
    assert made is not None
    return {item.name: item for item in made.ranges}


def problems_of(explicit: ExplicitShapes, inputs: tuple[GraphInput, ...] = DECODER) -> list[str]:
    with pytest.raises(UserErrors) as caught:
        profile_for_inputs(inputs, LIMITS, explicit)
    return [str(problem) for problem in caught.value.problems]


def test_limits_cover_prefill_and_decode_in_one_profile() -> None:
    """One profile takes an empty cache, a single token, and everything up to the limits."""
    ranges = profile(DECODER)
    assert ranges["input_ids"] == ShapeRange("input_ids", (1, 1), (1, 64), (4, 128))
    cache = ranges["past_key_values.0.value"]
    assert (cache.minimum, cache.optimum, cache.maximum) == ((1, 3, 0, 64), (1, 3, 512, 64), (4, 3, 1024, 64))


def test_a_static_cache_varies_in_its_batch_only() -> None:
    """Its length is a number of the graph; prompt and batch keep their ranges."""
    ranges = profile(STATIC)
    assert ranges["input_ids"] == ShapeRange("input_ids", (1, 1), (1, 64), (4, 128))
    assert ranges["write_indices"] == ShapeRange("write_indices", (1,), (1,), (4,))
    cache = ranges["past_key_values.0.key"]
    assert (cache.minimum, cache.optimum, cache.maximum) == ((1, 3, 1152, 64), (1, 3, 1152, 64), (4, 3, 1152, 64))
    assert ranges["attention_mask"].maximum == (4, 1152)


@pytest.mark.parametrize("end", ["minimum", "optimum", "maximum"])
def test_mask_is_as_long_as_cache_and_input_together(end: str) -> None:
    """At each end the mask fits: TensorRT only warns when it does not, and the engine then fails at that size."""
    ranges = profile(DECODER)
    sizes = {name: getattr(item, end) for name, item in ranges.items()}
    assert sizes["attention_mask"][1] == sizes["input_ids"][1] + sizes["past_key_values.0.key"][2]


def test_encoder_mask_follows_the_input() -> None:
    """Without a cache the mask has the symbol of the input, whatever the symbols are called."""
    assert profile(ENCODER)["attention_mask"].maximum == (4, 128)
    assert profile(ENCODER)["token_type_ids"].optimum == (1, 64)


def test_other_symbol_names_are_understood_by_position() -> None:
    """A graph that calls its dimensions s0 and s1 gets the same ranges: its inputs say what they are."""
    renamed = tuple(
        GraphInput(item.name, tuple({"batch": "s0", "past": "s1"}.get(str(dim), dim) for dim in item.dims))
        for item in DECODER
    )
    assert profile(renamed) == profile(DECODER)


def test_static_graph_needs_no_profile() -> None:
    """A graph without dynamic inputs gets None, not an empty profile."""
    assert profile_for_inputs((GraphInput("x", (2, 8)),), LIMITS) is None


@given(st.integers(1, 64), st.integers(1, 8192), st.integers(0, 65536))
def test_every_limit_gives_a_valid_profile(batch: int, length: int, cache: int) -> None:
    """No pair of limits makes minimum <= optimum <= maximum fail."""
    made = profile_for_inputs(DECODER, LlmLimits(batch, length, cache))
    assert made is not None
    check_profiles([made], DECODER)


def test_limits_below_their_floor_are_refused_together() -> None:
    """Zero tokens or sequences make no engine."""
    with pytest.raises(UserErrors) as caught:
        profile_for_inputs(DECODER, LlmLimits(0, 0, -1))
    assert [problem.path for problem in caught.value.problems] == [
        "--max-batch-size",
        "--max-input-len",
        "--max-kv-len",
    ]


def test_explicit_shapes_win_and_the_rest_follows_them() -> None:
    """Naming input_ids alone is enough: inputs with the same symbols follow, and the mask stays past + sequence."""
    ranges = profile(DECODER, ExplicitShapes({"input_ids": (2, 8)}, {"input_ids": (2, 16)}, {"input_ids": (8, 32)}))
    assert ranges["position_ids"] == ShapeRange("position_ids", (2, 8), (2, 16), (8, 32))
    assert ranges["past_key_values.0.key"].maximum == (8, 3, 1024, 64)
    assert ranges["attention_mask"].maximum == (8, 32 + 1024)


def test_optimum_alone_is_all_three() -> None:
    """A shape given once is the only shape."""
    ranges = profile(ENCODER, ExplicitShapes(optimum={"input_ids": (1, 128)}))
    assert ranges["attention_mask"] == ShapeRange("attention_mask", (1, 128), (1, 128), (1, 128))


def test_unknown_dimensions_need_explicit_shapes() -> None:
    """A dimension nothing is known about is asked for, not guessed."""
    image = (GraphInput("pixels", ("batch", 3, "height", "width")),)
    assert problems_of(ExplicitShapes(), image) == [
        "nothing says how large 'height' gets @ pixels[2]",
        "nothing says how large 'width' gets @ pixels[3]",
    ]
    shapes = {"pixels": (1, 3, 224, 224)}
    assert profile(image, ExplicitShapes(shapes, shapes, shapes))["pixels"].maximum == (1, 3, 224, 224)


def test_all_misfits_are_reported_at_once() -> None:
    """Unknown input, wrong rank, changed static dimension, and unordered sizes come in one error."""
    explicit = ExplicitShapes(
        {"input_id": (1, 1), "position_ids": (1,), "past_key_values.0.key": (1, 4, 0, 64), "input_ids": (2, 1)},
        {},
        {"input_id": (1, 1), "position_ids": (1, 1), "past_key_values.0.key": (1, 4, 8, 64), "input_ids": (1, 1)},
    )
    text = "\n".join(problems_of(explicit))
    assert "the graph has no such input (it has input_ids," in text
    assert "the minimum has 1 dimensions, the graph 2 @ position_ids" in text
    assert "the graph fixes this dimension to 3, not 4 @ past_key_values.0.key[1]" in text
    assert "minimum <= optimum <= maximum does not hold: 2/1/1 @ input_ids[0]" in text


def test_one_symbol_with_two_ranges_is_refused() -> None:
    """Two batch sizes in one profile can never be met together."""
    explicit = ExplicitShapes(maximum={"input_ids": (4, 8), "position_ids": (2, 8)})
    assert problems_of(explicit) == ["'batch' is 2 here and 4 in input_ids @ position_ids"]


def test_profile_of_another_graph_is_refused() -> None:
    """A static dimension that differs, and an input the profile forgets, are both named, with the profile."""
    other = Profile((ShapeRange("past_key_values.0.key", (1, 4, 0, 64), (1, 4, 1, 64), (1, 4, 2, 64)),))
    with pytest.raises(UserErrors) as caught:
        check_profiles([other], DECODER[2:4])
    assert [problem.path for problem in caught.value.problems] == [
        "profile 0: past_key_values.0.key[1]",
        "profile 0: position_ids",
    ]


def test_dynamic_graph_without_profile_is_refused() -> None:
    """TensorRT would say so only after minutes of work on a large graph."""
    with pytest.raises(UserErrors, match="there is no profile"):
        check_profiles([], DECODER)
    check_profiles([], (GraphInput("x", (2, 8)),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("input_ids:1x128", {"input_ids": (1, 128)}),
        ("a:1x2x3, b:0x4", {"a": (1, 2, 3), "b": (0, 4)}),
        ("x:0:1x2", {"x:0": (1, 2)}),
        ("'x:0':7", {"x:0": (7,)}),
    ],
)
def test_trtexec_shapes_are_read(text: str, expected: dict[str, tuple[int, ...]]) -> None:
    """Pasted trtexec shapes are understood, names with colons and quotes included."""
    assert shapes_from_option("--minShapes", text) == expected


@pytest.mark.parametrize("text", ["", "1x2", "x:", "x:1*2", "x:1x", "x:-1x2", "x:1xN", "a:1x2,,b:1", "x:1,x:1"])
def test_malformed_shapes_are_refused(text: str) -> None:
    """A shape that is not understood stops the run before the build."""
    with pytest.raises(UserErrors, match="--minShapes"):
        shapes_from_option("--minShapes", text)


def test_inputs_are_read_with_unnamed_dimensions(tmp_path: Path) -> None:
    """A dynamic dimension without a name gets its own, so that it is never tied to another."""
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", None, 8]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, [None]),
    ]
    node = helper.make_node("Identity", ["a"], ["y"])
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph), str(tmp_path / "g.onnx"))
    assert inputs_from_onnx(tmp_path / "g.onnx") == (
        GraphInput("a", ("batch", "a[1]", 8)),
        GraphInput("b", ("b[0]",)),
    )


def test_input_without_rank_is_refused(tmp_path: Path) -> None:
    """No profile can be made for a shape that is not known at all."""
    node = helper.make_node("Identity", ["a"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ay"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])), str(tmp_path / "g.onnx"))
    with pytest.raises(UserErrors, match="the input has no shape @ a"):
        inputs_from_onnx(tmp_path / "g.onnx")


def test_missing_graph_is_a_user_error(tmp_path: Path) -> None:
    """The file is named."""
    with pytest.raises(UserError, match=r"none\.onnx"):
        inputs_from_onnx(tmp_path / "none.onnx")
