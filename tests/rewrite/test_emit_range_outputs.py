"""The output `range_monitor`: which layers have a row, what is counted, and that nothing else changes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.files import write_json_model
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.numerics import equalized_absmax
from fptq_export.policy import Policy, PolicyArrays
from fptq_export.progress import NoProgress
from fptq_export.range_outputs import METADATA_KEY, OUTPUT_NAME, RangeOutputs, read_range_outputs
from fptq_export.rewrite import GraphForm, RewritePaths, lower_for_plugin, lower_for_tensorrt, rewrite
from fptq_export.rewrite.emit_range_outputs import EmitRangeOutputs, without_range_output
from fptq_export.rewrite.functions import DOMAIN, RANGE_MONITOR, range_monitor_function, register_function
from fptq_export.sites import Sites
from tests.rewrite.conftest import Rewritten
from tests.support.convolutions import ABSMAX, Case, decided, model_of, random_x, single
from tests.support.policies import measured_absmax
from tests.support.traced import causal_feed, run

FIXTURES = ("llama_rewritten", "llama_rewritten_fp16", "llama_precisions", "llama_precisions_fp16")
DIVISION = 4 * 2.0**-24
"""Relative: a rate is one float32 division of two exact counts, a peak two divisions of a number that is exact."""
FLOAT32 = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Block-INT4 MatMuls in float32, as verification runs them."""
HALF = 2.0**-11
"""Relative: ONNX Runtime drops pairs of casts to FP16 and back: a layer may read what was not rounded to FP16 yet."""


@dataclass(frozen=True)
class Monitored:
    """A graph with the output, and the same model without it."""

    plain: Rewritten
    w4a8: Path
    qdq: Path
    ranges: RangeOutputs


@pytest.fixture(params=FIXTURES)
def monitored(request: pytest.FixtureRequest, tmp_path: Path) -> Monitored:
    """Each of the tiny models of this folder, rewritten once more."""
    return monitored_of(request.getfixturevalue(request.param), tmp_path)


def monitored_of(plain: Rewritten, directory: Path) -> Monitored:
    """Rewrite a model from the same policy, with the output."""
    names = ("model.qdq.onnx", "model.w4a8.onnx", "range_outputs.json")
    paths = RewritePaths(plain.traced.model, *(directory / name for name in names))
    rewrite(paths, plain.traced.sites, plain.policy, plain.arrays, NoProgress())
    return Monitored(plain, paths.w4a8, paths.qdq, read_range_outputs(directory / "range_outputs.json"))


def expected_row(x: NDArray[Any], scale: float) -> list[float]:
    """What the contract says is clipped of a tensor, from NumPy: rint(x / scale) beyond INT8, in float32."""
    ratio = x.astype(np.float32) / np.float32(scale)
    codes = np.rint(ratio)
    clipped = ~((codes >= -128) & (codes <= 127))
    return [clipped.mean(dtype=np.float64), float(np.abs(ratio).max()) / 127, x.size]


def with_outputs(graph: Path, names: list[str]) -> Path:
    """The graph with values inside it as outputs, beside the file."""
    proto = onnx.load(graph, load_external_data=False)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    probe = graph.with_name("probe.onnx")
    onnx.save(proto, probe)
    return probe


def test_rows_count_what_the_layers_clip(monitored: Monitored, ids: NDArray[np.int64]) -> None:
    """Against NumPy on what each layer reads in the graph, after the fold, with scales made ten times too small."""
    policy = monitored.plain.policy
    small = {
        path: layer.model_copy(update={"activation_scale": layer.activation_scale / 10})
        for path, layer in policy.layers.items()
        if layer.activation_scale is not None
    }
    plain = monitored.plain
    tight = Rewritten(
        plain.traced,
        policy.model_copy(update={"layers": {**policy.layers, **small}}),
        plain.arrays,
        plain.qdq,
        plain.w4a8,
        plain.lowered,
    )
    found = monitored_of(tight, monitored.w4a8.parent)
    inputs = [plain.traced.sites.linear(row.layers[0]).input for row in found.ranges.rows]
    feed = causal_feed(found.w4a8, ids)
    values = run(with_outputs(found.w4a8, list(dict.fromkeys(inputs))), feed)
    rows = values[OUTPUT_NAME]
    rounding = HALF if values[inputs[0]].dtype == np.float16 else 0.0
    least, most = (
        [expected_row(values[x] * np.float32(by), row.scale) for x, row in zip(inputs, found.ranges.rows, strict=True)]
        for by in (1 - rounding, 1 + rounding)
    )
    assert (rows >= np.multiply(least, 1 - DIVISION)).all()
    assert (rows <= np.multiply(most, 1 + DIVISION)).all()
    assert (rows[:, 0] > 0).all(), "every scale was made too small"


def test_no_other_output_changes_a_bit(monitored: Monitored, ids: NDArray[np.int64]) -> None:
    """Logits and cache, of a prompt, plain and with all graph optimizations, in both forms."""
    for form in ("w4a8", "qdq"):
        before, after = (getattr(graphs, form) for graphs in (monitored.plain, monitored))
        feed = causal_feed(before, ids)
        for optimized in (False, True):
            expected, found = (run(path, feed, optimized=optimized, entries=FLOAT32) for path in (before, after))
            assert found.keys() - expected.keys() == {OUTPUT_NAME}
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, err_msg=f"{form} {name}")


def test_static_layers_have_one_row_and_no_other_layer_has_any(monitored: Monitored) -> None:
    """Per-token, w4a16 and float layers cannot be clipped; static ones are named once, with the policy's scale."""
    policy = monitored.plain.policy
    static = {path for path, layer in policy.quantized().items() if layer.activation in ("static", "lae_static")}
    named = [path for row in monitored.ranges.rows for path in row.layers]
    assert sorted(named) == sorted(static)
    assert len(policy.layers) > len(static)
    for row in monitored.ranges.rows:
        assert {policy.layers[path].activation_scale for path in row.layers} == {row.scale}
    proto = onnx.load(monitored.w4a8, load_external_data=False)
    read = {node.input[0] for node in proto.graph.node if node.op_type == RANGE_MONITOR}
    assert read == {monitored.plain.traced.sites.linear(path).input for path in static}


def test_every_form_of_the_graph_has_the_same_rows(llama_rewritten: Rewritten, tmp_path: Path) -> None:
    """A static INT8 cache and the slice before the head are made first: what linears read keeps its place."""
    plain = llama_rewritten
    paths = RewritePaths(*(tmp_path / name for name in ("model.onnx", "qdq.onnx", "w4a8.onnx", "ranges.json")))
    paths = dataclasses.replace(paths, model=plain.traced.model)
    form = GraphForm("last", "static", "int8")
    rewrite(paths, plain.traced.sites, plain.policy, plain.arrays, NoProgress(), form)
    assert read_range_outputs(tmp_path / "ranges.json") == monitored_of(plain, tmp_path / "plain").ranges


def test_readers_of_one_tensor_share_a_row(llama_rewritten: Rewritten, tmp_path: Path) -> None:
    """q, k and v are one row where they share a scale, as they share its quantization."""
    ranges = monitored_of(llama_rewritten, tmp_path).ranges
    static = {
        (llama_rewritten.traced.sites.linear(path).input, layer.activation_scale)
        for path, layer in llama_rewritten.policy.quantized().items()
        if layer.activation_scale is not None
    }
    assert len(ranges.rows) == len(static)
    assert max(len(row.layers) for row in ranges.rows) == 3


def test_the_graph_carries_the_order_of_its_rows(monitored: Monitored) -> None:
    """A graph that was moved without its JSON still says what each row is."""
    proto = onnx.load(monitored.w4a8, load_external_data=False)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert RangeOutputs.model_validate_json(metadata[METADATA_KEY]) == monitored.ranges
    shape = [dim.dim_value for dim in proto.graph.output[-1].type.tensor_type.shape.dim]
    assert (proto.graph.output[-1].name, shape) == (OUTPUT_NAME, [len(monitored.ranges.rows), 3])


def test_calibrated_maxima_are_those_after_the_fold(
    llama_rewritten: Rewritten, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """Drift is judged by what the layer reads: of an equalized one, log2(2 + v) and not v."""
    plain, policy = llama_rewritten, llama_rewritten.policy
    maxima = measured_absmax(plain.traced, ids)

    class Measured(PolicyArrays):
        def __contains__(self, name: str) -> bool:
            return name.endswith(".input_absmax") or super().__contains__(name)

        def read(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
            path = name.removesuffix(".input_absmax")
            array: NDArray[Any] = maxima[path] if path != name else super().read(name, shape)
            return array

    ranges = monitored_of(
        Rewritten(plain.traced, policy, Measured(plain.arrays.path), plain.qdq, plain.w4a8, plain.lowered), tmp_path
    ).ranges
    equalized = [row for row in ranges.rows if policy.layers[row.layers[0]].activation == "lae_static"]
    assert equalized
    for row in ranges.rows:
        layer = policy.layers[row.layers[0]]
        v = layer.input_absmax or 0.0
        assert row.calibrated_absmax == pytest.approx(equalized_absmax(v) if row in equalized else v, rel=2.0**-22)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16], ids=["fp32", "fp16"])
def test_ties_and_numbers_that_are_none_are_counted_as_quantize_linear_rounds(
    dtype: ir.DataType, tmp_path: Path
) -> None:
    """127.5 rounds to 128 and is clipped, -128.5 rounds to -128 and is not; infinity and NaN count as clipped."""
    x = np.array([[127.0, 127.25, 127.5, -127.5], [-128.0, -128.5, -129.0, np.inf], [np.nan, 0.0, 1.0, 2.0]])
    rows = [run_function(dtype, part.astype(dtype.numpy()), 1.0, tmp_path) for part in (x[:1], x[1:2], x[2:], x)]
    assert [row[0] * row[2] for row in rows[:3]] == [1, 2, 1]
    assert rows[3][0] == np.float32(4 / 12)
    assert rows[0][1] == np.float32(127.5) / np.float32(127)
    assert np.isinf(rows[1][1])
    assert [row[2] for row in rows] == [4, 4, 4, 12]


def test_counts_beyond_two_to_the_24_keep_the_rate(tmp_path: Path) -> None:
    """A float32 that is counted up by one stops at 2^24: 2^24 + 2^12 clipped values of as many are a rate of 1."""
    x = np.full((2**12 + 1, 2**12), 200, np.float16)
    rate, _, values = run_function(ir.DataType.FLOAT16, x, 1.0, tmp_path)
    assert (rate, values) == (1.0, x.size)


def run_function(dtype: ir.DataType, x: NDArray[Any], scale: float, directory: Path) -> NDArray[np.float32]:
    """The row of one tensor."""
    values = (ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([None, None])), ir.Value(name="scale"))
    values[1].type, values[1].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    node = ir.Node(DOMAIN, RANGE_MONITOR, values, name="monitor")
    (y,) = node.outputs
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([1, 3])
    model = ir.Model(ir.Graph(values, [y], nodes=[node], opset_imports={"": 21}, name="test"), ir_version=10)
    register_function(model, range_monitor_function(dtype))
    save_graph(model, directory / "function.onnx")
    row: NDArray[np.float32] = run(directory / "function.onnx", {"x": x, "scale": np.array(scale, np.float32)})["y"][0]
    return row


def test_lowered_forms_keep_the_output_and_its_numbers(
    llama_rewritten_fp16: Rewritten, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """Inlined for TensorRT the rows are the same bits, and the plugin's graph runs as many linears as without them."""
    found = monitored_of(llama_rewritten_fp16, tmp_path)
    lowered = tmp_path / "lowered.onnx"
    lower_for_tensorrt(found.w4a8, lowered)
    feed = causal_feed(found.w4a8, ids)
    portable, inlined = (run(path, feed, outputs=[OUTPUT_NAME])[OUTPUT_NAME] for path in (found.w4a8, lowered))
    np.testing.assert_array_equal(inlined, portable)
    with_it = lower_for_plugin(found.w4a8, tmp_path / "plugin.onnx")
    assert with_it == lower_for_plugin(llama_rewritten_fp16.w4a8, tmp_path / "plain.onnx")
    plugin = load_graph(tmp_path / "plugin.onnx")
    assert with_it.plugin
    assert plugin.graph.outputs[-1].name == OUTPUT_NAME
    assert not [node for node in plugin.graph if node.domain == DOMAIN]


def test_lowered_linears_keep_their_names(llama_rewritten: Rewritten, tmp_path: Path) -> None:
    """Engine layers are found by `<torch path>/<OpType>`: what monitor and layer share is named after the layer."""
    lower_for_tensorrt(monitored_of(llama_rewritten, tmp_path).w4a8, tmp_path / "lowered.onnx")
    before, after = (
        # Equal constants are merged, whoever reads them.
        {node.name: node.op_type for node in load_graph(path).graph if node.op_type != "Constant"}
        for path in (llama_rewritten.lowered, tmp_path / "lowered.onnx")
    )
    assert before.items() <= after.items()
    assert all(OUTPUT_NAME in (name or "") for name in after.keys() - before.keys())


def test_the_output_can_be_taken_away_again(monitored: Monitored) -> None:
    """Node by node the graph is the one without the option; a graph that never had the output stays as it is."""
    plain = load_graph(monitored.plain.w4a8)
    for path in (monitored.w4a8, monitored.plain.w4a8):
        model = without_range_output(load_graph(path))
        assert [node.name for node in model.graph] == [node.name for node in plain.graph]
        assert [value.name for value in model.graph.outputs] == [value.name for value in plain.graph.outputs]
        assert model.functions.keys() == plain.functions.keys()
        assert model.graph.initializers.keys() == plain.graph.initializers.keys()


def test_static_convolutions_have_a_row(tmp_path: Path) -> None:
    """Of a user's graph: every value of the tensor counts, against NumPy."""
    case = Case("Conv", (6, 4, 3, 3), (2, 4, 9, 9))
    model, sites, policy, arrays = decided(model_of(single(case), case), tmp_path)
    paths = RewritePaths(model, tmp_path / "model.qdq.onnx", tmp_path / "model.w4a8.onnx", tmp_path / "ranges.json")
    rewrite(paths, sites, policy, arrays, NoProgress())
    (row,) = read_range_outputs(tmp_path / "ranges.json").rows
    assert (row.layers, row.calibrated_absmax) == (("conv",), ABSMAX)
    x = random_x(*case.x)
    found = run(paths.w4a8, {"x": x})[OUTPUT_NAME]
    np.testing.assert_allclose(found, [expected_row(x, row.scale)], rtol=DIVISION, atol=0.0)
    assert found[0, 0] > 0


def test_policy_without_static_layers_is_refused(llama_rewritten: Rewritten, tmp_path: Path) -> None:
    """An output without rows would look as if nothing ever saturated."""
    layers = {
        path: layer.model_copy(update={"activation": "per_token", "activation_scale": None})
        for path, layer in llama_rewritten.policy.layers.items()
        if layer.activation is not None
    }
    policy = Policy(model="test", rule=llama_rewritten.policy.rule, layers=layers)
    model = load_graph(llama_rewritten.traced.model)
    with pytest.raises(UserError, match="no layer of this policy has a static activation scale"):
        EmitRangeOutputs(llama_rewritten.traced.sites, policy, llama_rewritten.arrays)(model)
    assert OUTPUT_NAME not in {value.name for value in model.graph.outputs}


def test_graph_with_a_value_of_that_name_is_refused(llama_rewritten: Rewritten) -> None:
    """A user's own `range_monitor` is not overwritten."""
    plain = llama_rewritten
    model = load_graph(plain.traced.model)
    model.graph.node(0).outputs[0].name = OUTPUT_NAME
    with pytest.raises(ir.passes.PreconditionError, match="value 'range_monitor' of its own"):
        EmitRangeOutputs(plain.traced.sites, plain.policy, plain.arrays)(model)


def test_policy_of_another_graph_is_refused(llama_rewritten: Rewritten) -> None:
    """A static layer without a node would have no row, unnoticed."""
    plain = llama_rewritten
    linears = tuple(linear.model_copy(update={"node": f"{linear.node}x"}) for linear in plain.traced.sites.linears)
    sites = Sites(linears=linears, fold_sites=plain.traced.sites.fold_sites)
    with pytest.raises(ir.passes.PreconditionError, match="the graph has no nodes"):
        EmitRangeOutputs(sites, plain.policy, plain.arrays)(load_graph(plain.traced.model))


def test_file_with_other_columns_is_refused(llama_rewritten: Rewritten, tmp_path: Path) -> None:
    """Numbers of another meaning are not read as rates."""
    ranges = monitored_of(llama_rewritten, tmp_path).ranges
    write_json_model(ranges.model_copy(update={"columns": ("peak", "rate", "values")}), tmp_path / "other.json")
    with pytest.raises(UserError, match="columns are"):
        read_range_outputs(tmp_path / "other.json")
