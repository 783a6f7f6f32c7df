"""INT8 convolutions are found in a layer list of TensorRT for RTX 1.7.1, and everything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fptq_export.build.int8_convolutions import Int8Convolution, check_int8_convolutions, is_of_convolution
from fptq_export.build.int8_layers import check_int8_layers
from fptq_export.build.layer_list import EngineLayer, check_layers, layers_from_log
from fptq_export.errors import PrecisionError

Layers = tuple[EngineLayer, ...]

CONVOLUTIONS = {
    path: Int8Convolution(shape, transposed=path == "up")
    for path, shape in {
        "rgb": (16, 3, 3, 3),
        "depthwise": (16, 1, 3, 3),
        "left": (16, 16, 1, 1),
        "right": (8, 16, 1, 1),
        "up": (24, 8, 2, 2),
        "volume": (8, 4, 3, 3, 3),
    }.items()
}
"""Three input channels and depthwise, which are padded; two that read one tensor; a ConvTranspose; 3-D."""


@pytest.fixture
def layers(golden: Path) -> Layers:
    """Layers of a recorded engine."""
    return layers_from_log(golden / "convolutions.txt")


def changed(layers: Layers, name: str, change: Callable[[EngineLayer], EngineLayer]) -> Layers:
    """The same layers, those whose names start so changed."""
    found = tuple(change(layer) if layer.name.startswith(name) else layer for layer in layers)
    assert found != layers
    return found


def with_types(layer: EngineLayer, inputs: str | None = None, constants: str | None = None) -> EngineLayer:
    """A layer whose inputs or large constants have another type."""
    return replace(
        layer,
        inputs=tuple(replace(item, datatype=inputs or item.datatype) for item in layer.inputs),
        constants=tuple(
            replace(item, datatype=constants) if constants and item.datatype == "Int8" else item
            for item in layer.constants
        ),
    )


def test_every_kind_of_convolution_passes(layers: Layers) -> None:
    """In 2 and 3 dimensions, padded, in groups; the transposed one is reported as computed in float."""
    assert check_int8_convolutions(layers, CONVOLUTIONS) == ("up",)


def test_they_are_no_linears(layers: Layers) -> None:
    """Their codes and padding are not taken for those of a linear that no policy has."""
    others = [layer for layer in layers if not is_of_convolution(layer, CONVOLUTIONS)]
    check_int8_layers(others, {})
    assert check_layers(layers, {}).int4_constants == 0
    with pytest.raises(PrecisionError, match="no linear of the policy"):
        check_int8_layers(layers, {})


def test_linears_are_left_to_their_own_check(golden: Path) -> None:
    """INT8 linears of another engine are of no convolution."""
    linears = layers_from_log(golden / "int8.txt")
    assert not any(is_of_convolution(layer, CONVOLUTIONS) for layer in linears)
    assert check_int8_convolutions(linears, {}) == ()


def test_codes_that_no_policy_names_are_refused(layers: Layers) -> None:
    """A convolution that should be float is left to the check of linears, which knows no such codes."""
    fewer = {path: entry for path, entry in CONVOLUTIONS.items() if path != "volume"}
    others = [layer for layer in layers if not is_of_convolution(layer, fewer)]
    with pytest.raises(PrecisionError, match="layer volume/Conv_myl0_1 holds 864 INT8 codes, 0 expected"):
        check_int8_layers(others, {})


@pytest.mark.parametrize("path", ["rgb", "depthwise", "volume"])
def test_weight_that_became_float_is_refused(layers: Layers, path: str) -> None:
    """With the layer and the type that it has."""
    folded = changed(layers, f"{path}/Conv", lambda layer: with_types(layer, constants="Float"))
    message = rf"{path}: 0 layers hold its INT8 codes, 1 expected \(it is in layer .* with constants Float"
    with pytest.raises(PrecisionError, match=message):
        check_int8_convolutions(folded, CONVOLUTIONS)


def test_float_input_is_refused(layers: Layers) -> None:
    """INT8 weights that meet a float input are not what the policy says."""
    with pytest.raises(PrecisionError, match="multiplies its INT8 codes in float, INT8 expected"):
        check_int8_convolutions(
            changed(layers, "left/Conv", lambda layer: with_types(layer, inputs="Float")), CONVOLUTIONS
        )


def test_only_transposed_convolutions_may_be_dequantized_alone(layers: Layers) -> None:
    """The same layer of a Conv is refused: there is an INT8 kernel for it."""
    as_conv = {**CONVOLUTIONS, "up": Int8Convolution((24, 8, 2, 2), transposed=False)}
    with pytest.raises(PrecisionError, match=r"up: layer .* multiplies its INT8 codes in float"):
        check_int8_convolutions(layers, as_conv)


@pytest.mark.parametrize(("path", "shape", "held"), [("left", (16, 20, 1, 1), 256), ("up", (24, 8, 3, 3), 768)])
def test_weight_of_another_size_is_refused(layers: Layers, path: str, shape: tuple[int, ...], held: int) -> None:
    """Multiplied or dequantized, the number of codes is that of the policy."""
    other = {**CONVOLUTIONS, path: replace(CONVOLUTIONS[path], weight_shape=shape)}
    with pytest.raises(PrecisionError, match=f"{path}: layer .* holds {held} INT8 codes"):
        check_int8_convolutions(layers, other)


def test_convolution_that_is_not_there_is_refused(layers: Layers) -> None:
    """It is named."""
    more = {**CONVOLUTIONS, "lost": Int8Convolution((4, 4, 1, 1), transposed=False)}
    with pytest.raises(PrecisionError, match=r"lost: 0 layers hold its INT8 codes, 1 expected \(no layer names it\)"):
        check_int8_convolutions(layers, more)


@pytest.mark.parametrize("copies", [1, 3])
def test_every_profile_has_its_copy(layers: Layers, copies: int) -> None:
    """One that a profile runs in another precision is missing there."""
    assert check_int8_convolutions(layers * 2, CONVOLUTIONS, profiles=2) == ("up",)
    with pytest.raises(PrecisionError, match=f"rgb: {copies} layers hold its INT8 codes, 2 expected"):
        check_int8_convolutions(layers * copies, CONVOLUTIONS, profiles=2)
