"""Golden logs: the end of real VERBOSE logs of TensorRT for RTX 1.7.1.116, from the recipes of `conftest.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fptq_export.build.layer_list import EngineLayer, EngineTensor, check_layers, layers_from_log
from fptq_export.errors import PrecisionError

CODES = 256 * 128
Q, K, V = "layer.q_proj", "layer.k_proj", "layer.v_proj"
MIXED = {Q: CODES, K: CODES, V: CODES}
STATIC, PER_TOKEN = "layer0", "layer1"
TILED = dict.fromkeys((STATIC, PER_TOKEN), 208 * 192)
"""Linears of 192 x 200 channels in `plugin.txt`; packed weights are padded to whole tiles."""
PLUGIN = {STATIC: "FptqW4A8GemmStatic", PER_TOKEN: "FptqW4A8GemmPerToken"}


def layer(
    constants: tuple[EngineTensor, ...],
    nodes: tuple[str, ...],
    inputs: tuple[EngineTensor, ...] = (EngineTensor("x", (-1, 256), "Half"),),
    outputs: tuple[EngineTensor, ...] = (EngineTensor("y", (-1, 128), "Half"),),
) -> EngineLayer:
    return EngineLayer("fused", "runtime_fusion", inputs, constants, outputs, "", nodes)


def int4(*dims: int) -> EngineTensor:
    return EngineTensor("w", dims, "Int4")


Q_NODES = (f"{Q}/DequantizeLinear_1", f"{Q}/MatMul")


def test_layer_is_read_whole(golden: Path) -> None:
    """Name, type, tensors with their data types, and ONNX nodes of a recorded layer come out as written."""
    (fused,) = (item for item in layers_from_log(golden / "mixed.txt") if f"{V}/MatMul" in item.onnx_nodes)
    assert fused.type == "runtime_fusion"
    assert [(item.dims, item.datatype) for item in fused.inputs] == [((-1, 256), "Half")]
    assert [(item.dims, item.datatype) for item in fused.constants] == [((256, 128), "Int4"), ((4, 128), "Half")]
    assert [(item.name, item.dims) for item in fused.outputs] == [(f"{V}/MatMul.output", (-1, 128))]
    assert fused.onnx_nodes == (f"{V}/DequantizeLinear_1", f"{V}/MatMul")
    assert fused.int4_codes == CODES


def test_every_line_of_the_list_is_a_layer(golden: Path) -> None:
    """Neither the log before the list nor the I/O tensors after it are taken for layers."""
    text = (golden / "mixed.txt").read_text(encoding="utf-8")
    assert len(layers_from_log(golden / "mixed.txt")) == text.count("LayerType: ")


@pytest.mark.parametrize(
    ("log", "quantized", "profiles", "constants"),
    [
        ("mixed", MIXED, 1, 3),
        ("fused_projections", {Q: CODES, K: CODES}, 1, 1),
        ("two_profiles", {Q: CODES}, 2, 2),
        ("one_group", {Q: CODES}, 1, 1),
    ],
)
def test_engine_that_follows_the_policy_passes(
    golden: Path, log: str, quantized: dict[str, int], profiles: int, constants: int
) -> None:
    """Separate linears, projections fused into one constant, two profiles, a weight with a single group: all right."""
    report = check_layers(layers_from_log(golden / f"{log}.txt"), quantized, profiles)
    assert report.quantized_linears == len(quantized)
    assert report.int4_constants == constants
    assert report.int4_codes == CODES * len(quantized)


ATTENTION = {f"self_attn.{name}_proj": 64 * width for name, width in (("q", 64), ("k", 32), ("v", 32), ("o", 64))}
MLP = {f"mlp.{name}_proj": 64 * 128 for name in ("gate", "up", "down")}
BF16 = {f"model.layers.{i}.{name}": codes for i in range(2) for name, codes in {**ATTENTION, **MLP}.items()}


def test_weights_dequantized_together_belong_to_all_their_linears(golden: Path) -> None:
    """In BF16 one layer unpacks q, k and v for one GEMM, and names the MatMul of v alone: no linear is missing."""
    report = check_layers(layers_from_log(golden / "merged_bf16.txt"), BF16)
    assert report.quantized_linears == 14
    assert report.int4_codes == sum(BF16.values())


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.gate_proj"])
def test_a_linear_that_should_be_float_is_seen_among_merged_ones(golden: Path, path: str) -> None:
    """More codes than those of the policy's linears are refused, whichever of them the layer names."""
    quantized = {name: codes for name, codes in BF16.items() if name != path}
    with pytest.raises(PrecisionError, match=r"INT4 codes, \d+ expected"):
        check_layers(layers_from_log(golden / "merged_bf16.txt"), quantized)


def test_report_counts_layers_by_type(golden: Path) -> None:
    """What is stored beside the engine is counted from the list."""
    report = check_layers(layers_from_log(golden / "mixed.txt"), MIXED)
    assert report.layers_by_type == {"kgen": 1, "runtime_fusion": 3, "shape_call": 1, "signal": 3, "wait": 4}


def test_unfused_weight_is_reported_not_refused(golden: Path) -> None:
    """A weight dequantized at every call gives the right numbers slowly: it is named in the report."""
    assert check_layers(layers_from_log(golden / "one_group.txt"), {Q: CODES}).unfused == (Q,)
    assert check_layers(layers_from_log(golden / "mixed.txt"), MIXED).unfused == ()


def test_block_int4_in_an_int8_gemm_is_refused(golden: Path) -> None:
    """The wrong fusion, which TensorRT builds without a warning, is found and the linear named."""
    with pytest.raises(PrecisionError, match=r"layer\.q_proj: layer .* unpacks its INT4 codes to INT8 for .*MatMul"):
        check_layers(layers_from_log(golden / "unpacked_to_int8.txt"), {Q: CODES})


def test_missing_linear_is_refused(golden: Path) -> None:
    """A linear of the policy that no layer holds fails the proof."""
    with pytest.raises(
        PrecisionError, match=r"layer\.o_proj: no layer holds its INT4 codes; no layer names its MatMul"
    ):
        check_layers(layers_from_log(golden / "mixed.txt"), MIXED | {"layer.o_proj": CODES})


def test_linear_that_became_float_is_refused_with_what_it_is_now(golden: Path, tmp_path: Path) -> None:
    """A weight folded to FP16 is named with the layer and the type it has."""
    text = (golden / "mixed.txt").read_text(encoding="utf-8")
    (tmp_path / "log").write_text(text.replace("Datatype: Int4", "Datatype: Half"), encoding="utf-8")
    with pytest.raises(PrecisionError, match=r"k_proj: .* MatMul is in layer .* with constants Half \[256, 128\]"):
        check_layers(layers_from_log(tmp_path / "log"), MIXED)


def test_int4_constant_outside_the_policy_is_refused(golden: Path) -> None:
    """A linear that is 4-bit in the engine and float in the policy fails as well."""
    with pytest.raises(PrecisionError, match=f"no linear of the policy: layer .* holds {CODES} INT4 codes, 0 expected"):
        check_layers(layers_from_log(golden / "mixed.txt"), {Q: CODES, K: CODES})


@pytest.mark.parametrize("codes", [CODES // 2, CODES + 2])
def test_constant_of_another_size_is_refused(golden: Path, codes: int) -> None:
    """An engine built from other weights than the policy's is found by the number of codes."""
    with pytest.raises(PrecisionError, match=f"holds {CODES} INT4 codes, {codes} expected"):
        check_layers(layers_from_log(golden / "mixed.txt"), MIXED | {V: codes})


def test_fused_constant_that_lacks_a_linear_is_refused() -> None:
    """A fused layer that names two linears must hold the codes of both."""
    lacking = layer((int4(256, 128),), (*Q_NODES, f"{K}/MatMul"))
    with pytest.raises(PrecisionError, match=f"holds {CODES} INT4 codes, {2 * CODES} expected"):
        check_layers([lacking], {Q: CODES, K: CODES})


def test_three_constants_in_one_layer_are_three_linears() -> None:
    """Fused projections may also keep one constant each."""
    nodes = tuple(f"{path}/MatMul" for path in MIXED)
    report = check_layers([layer((int4(256, 128),) * 3, nodes)], MIXED)
    assert report.int4_constants == 3


def merged_dequantization(codes: int) -> list[EngineLayer]:
    """What TensorRT makes of weights of one group on a two-dimensional input: it unpacks both under the name of one."""
    weights = EngineTensor("unpacked", (256, 256), "Half")
    unpacking = layer((int4(256, codes // 256),), (f"{K}/DequantizeLinear",), inputs=(), outputs=(weights,))
    gemm = layer((), (f"{K}/MatMul", f"{Q}/MatMul"), inputs=(EngineTensor("x", (-1, 256), "Half"), weights))
    return [unpacking, gemm]


def test_codes_that_are_unpacked_together_are_those_of_the_gemm_behind() -> None:
    """Experts that read one tensor: both linears are proven, and both are reported as not fused."""
    report = check_layers(merged_dequantization(2 * CODES), {Q: CODES, K: CODES})
    assert report.unfused == (Q, K)
    assert report.int4_constants == 1


def test_codes_that_are_unpacked_together_must_be_those_of_all() -> None:
    """With the codes of one and a half of the two linears nothing is proven."""
    with pytest.raises(PrecisionError, match=f"holds {CODES * 3 // 2} INT4 codes"):
        check_layers(merged_dequantization(CODES * 3 // 2), {Q: CODES, K: CODES})


@pytest.mark.parametrize("profiles", [1, 3])
def test_copies_must_equal_the_profiles(golden: Path, profiles: int) -> None:
    """A linear that one profile runs in another precision is missing there: copies are counted."""
    with pytest.raises(PrecisionError, match=f"2 layers hold its INT4 codes, {profiles} expected"):
        check_layers(layers_from_log(golden / "two_profiles.txt"), {Q: CODES}, profiles)


def test_int8_activation_without_barrier_is_refused() -> None:
    """INT8 activations and INT4 codes in one kernel with nothing between them are not trusted."""
    mixed = layer((int4(256, 128),), Q_NODES, inputs=(EngineTensor("x", (-1, 256), "Int8"),))
    with pytest.raises(PrecisionError, match="without the barrier"):
        check_layers([mixed], {Q: CODES})


def test_int8_activation_behind_the_barrier_is_left_alone() -> None:
    """A kernel that dequantizes the activation itself, barrier included, computes in floating point."""
    fused = layer((int4(256, 128),), (*Q_NODES, f"{K}/Max_1"), inputs=(EngineTensor("x", (-1, 256), "Int8"),))
    assert check_layers([fused], {Q: CODES}).int4_constants == 1


def test_int8_output_of_a_gemm_is_left_alone() -> None:
    """A GEMM that also quantizes its result for the next linear does not unpack its weight."""
    fused = layer((int4(256, 128),), Q_NODES, outputs=(EngineTensor("y", (-1, 128), "Int8"),))
    assert check_layers([fused], {Q: CODES}).int4_constants == 1


def test_linear_whose_name_begins_like_another_is_not_mixed_up() -> None:
    """`layer.1` and `layer.10` are two linears."""
    items = [
        dataclasses.replace(layer((int4(256, 128),), (f"layer.{number}/MatMul",)), name=f"fused{number}")
        for number in (1, 10)
    ]
    assert check_layers(items, {"layer.1": CODES, "layer.10": CODES}).int4_constants == 2
    with pytest.raises(PrecisionError, match=r"layer\.1: no layer holds"):
        check_layers(items[1:], {"layer.1": CODES, "layer.10": CODES})


def test_all_mismatches_are_listed(golden: Path) -> None:
    """Every wrong linear is in the message, not only the first."""
    with pytest.raises(PrecisionError) as caught:
        check_layers(layers_from_log(golden / "mixed.txt"), MIXED | {V: 2, "a": 2, "b": 2})
    assert [name in str(caught.value) for name in (f"{V}:", "a:", "b:")] == [True] * 3


def test_log_without_list_proves_nothing(tmp_path: Path) -> None:
    """A log that ends early, or was written without DETAILED verbosity, fails instead of passing an empty check."""
    (tmp_path / "log").write_text("[V] Graph construction completed\n", encoding="utf-8")
    with pytest.raises(PrecisionError, match="listed no layers"):
        layers_from_log(tmp_path / "log")


def test_unreadable_layer_proves_nothing(golden: Path, tmp_path: Path) -> None:
    """A line in a form this parser does not know is an error: a layer that is skipped could be the wrong one."""
    text = (golden / "mixed.txt").read_text(encoding="utf-8").replace("LayerType: kgen", "Kind: kgen")
    (tmp_path / "log").write_text(text, encoding="utf-8")
    with pytest.raises(PrecisionError, match="cannot read this layer"):
        layers_from_log(tmp_path / "log")


def test_plugin_layers_are_counted(golden: Path) -> None:
    """Linears that the plugin runs are found by their node, hold padded codes, and are none of the unfused."""
    report = check_layers(layers_from_log(golden / "plugin.txt"), TILED, plugin=PLUGIN)
    assert (report.plugin_layers, report.int4_constants, report.unfused) == (2, 2, ())
    assert report.layers_by_type["custom_layer"] == 2


def test_linear_that_should_run_natively_is_refused_in_the_plugin(golden: Path) -> None:
    """Without being asked the plugin runs nothing."""
    with pytest.raises(PrecisionError, match=r"layer1: the plugin runs it in layer .*, natively expected"):
        check_layers(layers_from_log(golden / "plugin.txt"), TILED, plugin={STATIC: PLUGIN[STATIC]})


def test_linear_that_should_run_in_the_plugin_is_refused_elsewhere(golden: Path) -> None:
    """An engine that fell back to the native lowering is no engine with the plugin."""
    plugin = {Q: "FptqW4A8GemmStatic"}
    with pytest.raises(PrecisionError, match=r"q_proj: layer .* \(runtime_fusion\) runs it, FptqW4A8GemmStatic of the"):
        check_layers(layers_from_log(golden / "mixed.txt"), MIXED, plugin=plugin)


def test_other_mode_of_the_plugin_is_refused(golden: Path) -> None:
    """Per token where the policy says static is another precision."""
    plugin = {**PLUGIN, STATIC: "FptqW4A8GemmPerToken"}
    with pytest.raises(PrecisionError, match=r"layer0: layer .* FptqW4A8GemmPerToken of the plugin expected"):
        check_layers(layers_from_log(golden / "plugin.txt"), TILED, plugin=plugin)


def test_plugin_weight_without_padding_is_refused(golden: Path) -> None:
    """The codes in the engine are those of the packed weight, not of another one."""
    with pytest.raises(PrecisionError, match="holds 39936 INT4 codes, 38400 expected"):
        check_layers(layers_from_log(golden / "plugin.txt"), dict.fromkeys(TILED, 200 * 192), plugin=PLUGIN)


QKV = "layer.q_proj+k_proj+v_proj"
FUSED = {QKV: (Q, K, V)}
RUN = {QKV: "FptqW4A8GemmStatic"}


def plugin_layer(path: str, *dims: int) -> EngineLayer:
    return dataclasses.replace(layer((int4(*dims),), (f"{path}/{RUN[QKV]}",)), type="custom_layer")


def test_fused_layer_proves_every_linear_in_it() -> None:
    """One layer with the codes of q, k and v counts as one layer and three linears."""
    items = [plugin_layer(QKV, 384, 256)]
    report = check_layers(items, {QKV: 3 * CODES}, plugin=RUN, fused=FUSED)
    assert (report.quantized_linears, report.plugin_linears, report.plugin_layers) == (3, 3, 1)
    assert report.int4_codes == 3 * CODES


def test_fused_layer_without_one_of_its_linears_is_refused() -> None:
    """A layer that holds the codes of q and k only proves nothing about v, nor about the other two."""
    with pytest.raises(PrecisionError, match=f"holds {2 * CODES} INT4 codes, {3 * CODES} expected"):
        check_layers([plugin_layer(QKV, 256, 256)], {QKV: 3 * CODES}, plugin=RUN, fused=FUSED)


def test_missing_fused_layer_is_refused_with_its_linears() -> None:
    """Layers of q, k and v alone are not what was asked for; the message names all three."""
    items = [plugin_layer(path, 128, 256) for path in (Q, K, V)]
    with pytest.raises(PrecisionError, match=r"q_proj\+k_proj\+v_proj: no layer holds its INT4 codes"):
        check_layers(items, {QKV: 3 * CODES}, plugin=RUN, fused=FUSED)
