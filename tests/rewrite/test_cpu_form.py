"""The form for the CPU kernels computes what the portable graph computes, and leaves alone what it cannot carry."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph
from fptq_export.rewrite.cache_in_place import CACHED_ATTENTION, CacheInPlace
from fptq_export.rewrite.cpu_form import cpu_form_from_path
from fptq_export.rewrite.functions import W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.fuse_attention import FuseAttention
from fptq_export.rewrite.fuse_prologue import SKIP_NORM, SWI_GLU
from fptq_export.rewrite.fuse_rotary import FuseRotary
from fptq_export.rewrite.lower_to_cpu import CPU_DOMAIN, HALF_LINEAR, LowerToCpu
from fptq_export.rewrite.widen_to_float import WidenToFloat
from fptq_export.runtime import cpu_session as module
from fptq_export.runtime.cpu_session import cpu_session
from fptq_export.verify.in_place_session import InPlaceCausalSession
from fptq_export.verify.sessions import CausalSession, OnnxCausalSession
from tests.rewrite.conftest import Rewritten
from tests.support.cpu_kernels import built_cpu_kernels

LOGITS = 1e-4
"""Of the largest logit. Sums in another order move FP32 results by some 1e-6; where that makes a single activation code
another one, logits move by 1e-3 and more, and then all of them."""
FLOATS = frozenset({ir.DataType.FLOAT})


@pytest.fixture(scope="module")
def kernels() -> None:
    """The operators, built."""
    built_cpu_kernels()


def operators(graph: bytes) -> Counter[str]:
    """Operators of a graph -> how many of them."""
    return Counter(node.op_type for node in onnx.load_model_from_string(graph).graph.node)


def assert_same_last(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Logits of the last token agree."""
    last = expected[:, -1:]
    assert found.shape == last.shape
    assert np.abs(found - last).max() <= LOGITS * np.abs(last).max()


@pytest.fixture(scope="module")
def pair(kernels: None, llama_rewritten: Rewritten) -> tuple[CausalSession, CausalSession]:
    """The tiny LLaMA with the kernels, and in stock operators."""
    fast = cpu_session(llama_rewritten.w4a8, 1, "cpu")
    assert isinstance(fast, InPlaceCausalSession)
    return fast, OnnxCausalSession(llama_rewritten.w4a8, threads=1)


def test_prompt_and_every_token_after_it(pair: tuple[CausalSession, CausalSession], ids: NDArray[np.int64]) -> None:
    """Two texts at once: the same logits after the prompt and after each of three tokens."""
    fast, stock = pair
    found, cache = fast.prefill(ids)
    expected, stock_cache = stock.prefill(ids)
    assert_same_last(found, expected)
    for step in range(3):
        found, cache = fast.decode(ids[:, step : step + 1], cache)
        expected, stock_cache = stock.decode(ids[:, step : step + 1], stock_cache)
        assert_same_last(found, expected)


def test_cache_can_be_gone_on_from_twice(pair: tuple[CausalSession, CausalSession], ids: NDArray[np.int64]) -> None:
    """The second text does not see the first one's token, and the first one goes on as if alone."""
    fast, stock = pair
    _, cache = fast.prefill(ids)
    _, stock_cache = stock.prefill(ids)
    first, second = ids[:, :1], ids[:, 5:6]
    _, after_first = fast.decode(first, cache)
    _, stock_after_first = stock.decode(first, stock_cache)
    assert_same_last(fast.decode(second, cache)[0], stock.decode(second, stock_cache)[0])
    assert_same_last(fast.decode(second, after_first)[0], stock.decode(second, stock_after_first)[0])


def test_several_tokens_go_on_from_a_cache(pair: tuple[CausalSession, CausalSession], ids: NDArray[np.int64]) -> None:
    """One text by three tokens, and two texts by three tokens each."""
    fast, stock = pair
    for texts in (ids[:1], ids):
        _, cache = fast.prefill(texts)
        _, stock_cache = stock.prefill(texts)
        assert_same_last(fast.decode(texts[:, :3], cache)[0], stock.decode(texts[:, :3], stock_cache)[0])


def test_buffer_grows(pair: tuple[CausalSession, CausalSession], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays when the slots are used up."""
    monkeypatch.setattr("fptq_export.verify.in_place_session._LEAST_SLOTS", 16)
    fast, stock = pair
    texts = np.arange(20, 40)[None]
    _, cache = fast.prefill(texts[:, :14])
    _, stock_cache = stock.prefill(texts[:, :14])
    for step in range(14, 19):
        found, cache = fast.decode(texts[:, step : step + 1], cache)
        expected, stock_cache = stock.decode(texts[:, step : step + 1], stock_cache)
        assert_same_last(found, expected)


def test_token_beyond_the_vocabulary_is_an_error(pair: tuple[CausalSession, CausalSession]) -> None:
    """Not a crash, nor another token."""
    with pytest.raises(UserError, match="ONNX Runtime cannot run it"):
        pair[0].prefill(np.array([[100_000]]))


def test_linears_that_read_one_tensor_are_one_node(llama_rewritten_fp16: Rewritten) -> None:
    """Every W4A8 linear is lowered, no function is left, and attention is one node a layer."""
    form = cpu_form_from_path(llama_rewritten_fp16.w4a8)
    portable = Counter(node.op_type for node in load_graph(llama_rewritten_fp16.w4a8).graph)
    linears = portable[W4A8_STATIC] + portable[W4A8_PER_TOKEN]
    lowered = [op for op in form.lowered.values() if op in (W4A8_STATIC, W4A8_PER_TOKEN)]
    found = operators(form.graph)
    assert len(lowered) == linears
    assert sum(count for op, count in found.items() if "W4A8" in op) < linears
    assert not onnx.load_model_from_string(form.graph).functions
    assert form.cache_in_place
    assert found[CACHED_ATTENTION] == portable["Softmax"]
    assert not found["Softmax"]
    norms = sum(count for op, count in found.items() if op.startswith(SKIP_NORM))
    assert norms + found["SkipSimplifiedLayerNormalization"] == 2 * portable["Softmax"]
    assert found["SkipSimplifiedLayerNormalization"] == 1  # the last one, before the head
    assert sum(count for op, count in found.items() if op.startswith(SWI_GLU)) == portable["Softmax"]


def test_half_graph_computes_in_float(llama_rewritten_fp16: Rewritten) -> None:
    """Inputs, outputs and norms are FLOAT; large weights stay FLOAT16 in the file, the head is read so."""
    graph = onnx.load_model_from_string(cpu_form_from_path(llama_rewritten_fp16.w4a8).graph).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert {dtype for name, dtype in types.items() if name == "logits" or ".key" in name} == {onnx.TensorProto.FLOAT}
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    readers = {node.op_type for node in graph.node for name in node.input if name in half}
    others = {op for op in readers if "W4A8Gemm" not in op}
    assert others <= {HALF_LINEAR, "Gather", "Cast"}
    assert HALF_LINEAR in others
    assert others < readers


def test_other_families_run_too(kernels: None, opt_rewritten: Rewritten, ids: NDArray[np.int64]) -> None:
    """OPT: LayerNorm, learned positions, biases, a head that is quantized."""
    fast = cpu_session(opt_rewritten.w4a8, 1, "cpu")
    stock = OnnxCausalSession(opt_rewritten.w4a8, threads=1)
    found, cache = fast.prefill(ids)
    expected, stock_cache = stock.prefill(ids)
    assert_same_last(found, expected)
    assert_same_last(fast.decode(ids[:, :1], cache)[0], stock.decode(ids[:, :1], stock_cache)[0])


def fused(path: Path) -> ir.Model:
    """A graph whose attention is one operator."""
    model = load_graph(path)
    for rewrite in (FuseRotary(), FuseAttention(FLOATS)):
        rewrite(model)
    return model


def test_rotation_of_whole_heads_is_left_to_attention(llama_rewritten: Rewritten) -> None:
    """Queries and keys are turned where they are read, by the angles that they share."""
    model = fused(llama_rewritten.w4a8)
    rewrite = CacheInPlace()
    assert rewrite(model).modified
    assert {len(node.inputs) for node in model.graph if node.op_type == CACHED_ATTENTION} == {8}
    assert not [node for node in model.graph if node.op_type == "RotaryEmbedding"]


@pytest.mark.parametrize("attribute", ["interleaved", "rotary_embedding_dim"])
def test_other_rotations_stay(llama_rewritten: Rewritten, attribute: str) -> None:
    """Neighbours in pairs, or a part of a head: the operator knows neither, and gets what is turned already."""
    model = fused(llama_rewritten.w4a8)
    rotations = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    rotations[0].attributes[attribute] = ir.AttrInt64(attribute, 1)
    rewrite = CacheInPlace()
    assert rewrite(model).modified
    inputs = sorted(len(node.inputs) for node in model.graph if node.op_type == CACHED_ATTENTION)
    assert inputs[0] == 6
    assert len([node for node in model.graph if node.op_type == "RotaryEmbedding"]) == 2 * inputs.count(6)


def test_heads_of_another_size_are_left_alone(llama_rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel took 32 channels at once: these heads have 16."""
    monkeypatch.setattr("fptq_export.rewrite.cache_in_place.KEY_PANEL", 32)
    rewrite = CacheInPlace()
    assert not rewrite(fused(llama_rewritten.w4a8)).modified
    assert "its heads have 16 channels" in next(iter(rewrite.left_alone.values()))


def test_another_mask_is_left_alone(llama_rewritten: Rewritten) -> None:
    """A mask that may hide earlier tokens, as a sliding window does: the operator would show them."""
    model = fused(llama_rewritten.w4a8)
    comparison = next(node for node in model.graph if node.op_type == "LessOrEqual")
    comparison.op_type = "Less"
    rewrite = CacheInPlace()
    assert not rewrite(model).modified
    assert "Less" in next(iter(rewrite.left_alone.values()))


def test_second_comparison_is_left_alone(llama_rewritten: Rewritten) -> None:
    """Two conditions are not the causal one."""
    model = fused(llama_rewritten.w4a8)
    comparison = next(node for node in model.graph if node.op_type == "LessOrEqual")
    other = ir.node("LessOrEqual", list(reversed(comparison.inputs)), name="other")
    both = ir.node("And", [comparison.outputs[0], other.outputs[0]], name="both")
    ir.convenience.replace_all_uses_with(comparison.outputs[0], both.outputs[0])
    both.replace_input_with(0, comparison.outputs[0])
    model.graph.insert_after(comparison, [other, both])
    rewrite = CacheInPlace()
    assert not rewrite(model).modified
    assert "2 comparisons" in next(iter(rewrite.left_alone.values()))


def test_one_attention_of_another_form_keeps_all(llama_rewritten: Rewritten) -> None:
    """The operators share their lengths: all or none."""
    model = fused(llama_rewritten.w4a8)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes.pop("scale")
    rewrite = CacheInPlace()
    assert not rewrite(model).modified
    assert rewrite.fused == 0


def test_weight_that_is_computed_is_left_alone(llama_rewritten: Rewritten) -> None:
    """The kernel needs a constant; the others are lowered."""
    model = load_graph(llama_rewritten.w4a8)
    node = next(node for node in model.graph if node.op_type == W4A8_STATIC)
    scales = node.inputs[2]
    copy = ir.node("Identity", [scales], name="copy")
    model.graph.insert_before(node, copy)
    node.replace_input_with(2, copy.outputs[0])
    rewrite = LowerToCpu()
    rewrite(model)
    assert list(rewrite.left_alone) == [(node.name or "").rpartition("/")[0]]
    assert node in list(model.graph)
    assert rewrite.lowered


def constant(name: str, array: NDArray[np.float16]) -> ir.Value:
    """An initializer."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def test_large_constants_are_cast_and_small_ones_widened() -> None:
    """The file does not grow by the embedding, and a gathered row is cast, not the table."""
    half = np.arange(70000, dtype=np.float16).reshape(-1, 7)
    small, large = (constant(name, array) for name, array in (("small", half[0]), ("large", half)))
    index = ir.Value(name="index", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [large, index], name="gather")
    add = ir.node("Add", [gather.outputs[0], small], name="add")
    for value in (gather.outputs[0], add.outputs[0]):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape([2, 7])
    graph = ir.Graph(
        [index], [add.outputs[0]], nodes=[gather, add], initializers=[small, large], opset_imports={"": 21}
    )
    model = ir.Model(graph, ir_version=10)
    WidenToFloat()(model)
    assert [node.op_type for node in graph] == ["Gather", "Cast", "Add"]
    assert gather.outputs[0].dtype == ir.DataType.FLOAT16
    assert {value.dtype for value in add.inputs if value is not None} == {ir.DataType.FLOAT}
    assert graph.outputs[0].dtype == ir.DataType.FLOAT


def test_what_runs_is_said(kernels: None, llama_rewritten: Rewritten) -> None:
    """The name of the session tells the kernels from the stock operators."""
    assert cpu_session(llama_rewritten.w4a8, 1).name.endswith("(CPU kernels)")
    assert cpu_session(llama_rewritten.w4a8, 1, "stock").name.endswith("(stock operators)")


def test_kernels_that_are_not_built(
    llama_rewritten: Rewritten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, they are an error that names the command; else the stock operators run, and say so."""
    monkeypatch.setattr(module, "operators_path", lambda: tmp_path / "nothing.so")
    assert cpu_session(llama_rewritten.w4a8, 1).name.endswith("(stock operators)")
    with pytest.raises(UserError, match="not built") as caught:
        cpu_session(llama_rewritten.w4a8, 1, "cpu")
    assert "fptq_export.cpu build" in caught.value.hint


def test_graph_without_w4a8_linears_has_nothing_for_the_kernels(kernels: None, llama_rewritten: Rewritten) -> None:
    """The float graph runs as it is, and is refused where the kernels are asked for."""
    graph = llama_rewritten.traced.model
    assert cpu_session(graph, 1).name.endswith("(stock operators)")
    with pytest.raises(UserError, match="no W4A8 linear"):
        cpu_session(graph, 1, "cpu")


def test_operators_that_do_not_load_are_an_error(
    llama_rewritten: Rewritten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and the command that mends it are named."""
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(module, "operators_path", lambda: tmp_path / "broken.so")
    with pytest.raises(UserError, match=r"broken\.so.*cannot load") as caught:
        cpu_session(llama_rewritten.w4a8, 1, "cpu")
    assert "build" in caught.value.hint


def test_domain_of_the_operators_is_imported(llama_rewritten: Rewritten) -> None:
    """`fptq.cpu` is, and `fptq` is gone with the functions."""
    model = onnx.load_model_from_string(cpu_form_from_path(llama_rewritten.w4a8).graph)
    domains = {opset.domain for opset in model.opset_import}
    assert CPU_DOMAIN in domains
    assert "fptq" not in domains
