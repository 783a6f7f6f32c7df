"""INT8 linears are found in a layer list of TensorRT for RTX 1.7.1, and everything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fptq_export.build.int8_layers import check_int8_layers
from fptq_export.build.layer_list import EngineLayer, check_layers, layers_from_log
from fptq_export.errors import PrecisionError

Q, K, V = (f"layer.{name}_proj" for name in "qkv")
CODES = 256 * 128
INT8 = {Q: CODES, K: CODES, V: CODES}
"""q and k static, fused by TensorRT; v per token."""


@pytest.fixture
def layers(golden: Path) -> tuple[EngineLayer, ...]:
    """Layers of a recorded engine."""
    return layers_from_log(golden / "int8.txt")


def test_fused_and_single_linears_pass(layers: tuple[EngineLayer, ...]) -> None:
    """Static and per-token linears are INT8 GEMMs; nothing in them is INT4."""
    check_int8_layers(layers, INT8)
    assert check_layers(layers, {}).int4_constants == 0


def test_engines_without_int8_linears_pass(golden: Path) -> None:
    """INT8 activations alone are no INT8 weights."""
    for name in ("mixed", "one_group", "plugin"):
        check_int8_layers(layers_from_log(golden / f"{name}.txt"), {})


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({**INT8, "layer.o_proj": CODES}, r"layer\.o_proj: no layer holds its INT8 codes; no layer names its MatMul"),
        ({Q: CODES, K: CODES}, f"no linear of the policy: layer .* holds {CODES} INT8 codes, 0 expected"),
        ({**INT8, V: CODES + 128}, f"v_proj: layer .* holds {CODES} INT8 codes, {CODES + 128} expected"),
        ({K: CODES, V: CODES}, f"k_proj: layer .* holds {2 * CODES} INT8 codes, {CODES} expected"),
    ],
)
def test_other_weights_than_the_policys_are_refused(
    layers: tuple[EngineLayer, ...], expected: dict[str, int], message: str
) -> None:
    """Missing linears, linears that should be float, and weights of another size are named."""
    with pytest.raises(PrecisionError, match=message):
        check_int8_layers(layers, expected)


def test_weight_that_became_float_is_refused(golden: Path, tmp_path: Path) -> None:
    """A weight folded to FP16 is named with the layer and the type it has."""
    text = (golden / "int8.txt").read_text(encoding="utf-8")
    (tmp_path / "log").write_text(text.replace("Datatype: Int8", "Datatype: Half"), encoding="utf-8")
    with pytest.raises(PrecisionError, match=r"v_proj: .* MatMul is in layer .* with constants Half \[256, 128\]"):
        check_int8_layers(layers_from_log(tmp_path / "log"), INT8)


def test_float_input_is_refused(layers: tuple[EngineLayer, ...]) -> None:
    """INT8 weights that meet a float input are a weight-only linear, which the policy does not say."""

    def with_half_inputs(layer: EngineLayer) -> EngineLayer:
        return replace(layer, inputs=tuple(replace(tensor, datatype="Half") for tensor in layer.inputs))

    with pytest.raises(PrecisionError, match="multiplies its INT8 codes by Half, INT8 expected"):
        check_int8_layers([with_half_inputs(layer) for layer in layers], INT8)


@pytest.mark.parametrize("copies", [1, 3])
def test_every_profile_has_its_copy(layers: tuple[EngineLayer, ...], copies: int) -> None:
    """A linear that one profile runs in another precision is missing there."""
    check_int8_layers(layers * 2, INT8, profiles=2)
    with pytest.raises(PrecisionError, match=f"{copies} layers hold its INT8 codes, 2 expected"):
        check_int8_layers(layers * copies, INT8, profiles=2)


def test_embedding_that_is_looked_up_rounded_is_no_weight(golden: Path) -> None:
    """OLMo 2 reads the embedding without a norm: its table is stored in INT8 for the first linears, which are INT4."""
    check_int8_layers(layers_from_log(golden / "embedding_int8.txt"), {})


@pytest.mark.parametrize(
    "change",
    [
        lambda lookup: replace(lookup, inputs=()),
        lambda lookup: replace(lookup, inputs=(*lookup.inputs, replace(lookup.inputs[0], datatype="Half"))),
        lambda lookup: replace(lookup, onnx_nodes=(*lookup.onnx_nodes, "layer.q_proj/MatMul")),
    ],
    ids=["dequantizes a weight", "reads activations", "multiplies"],
)
def test_table_that_is_more_than_looked_up_is_refused(
    golden: Path, change: Callable[[EngineLayer], EngineLayer]
) -> None:
    """INT8 codes beside a float input or a MatMul, or on their way to one, are a weight that no policy asked for."""
    layers = layers_from_log(golden / "embedding_int8.txt")
    (lookup,) = (layer for layer in layers if any(tensor.datatype == "Int8" for tensor in layer.constants))
    with pytest.raises(PrecisionError, match=r"no linear of the policy: layer .* holds 32768 INT8 codes, 0 expected"):
        check_int8_layers([change(lookup)], {})
