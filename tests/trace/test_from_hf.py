from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph
from fptq_export.trace.from_hf import traced_from_config
from tests.support.traced import FP32_LOGITS, Traced, causal_feed, run, torch_logits, traced_once

VOCAB = 512
RMS_NORM_OPS = ("Pow", "ReduceMean", "Sqrt", "Reciprocal")


def _ids(batch: int, sequence: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, sequence))


def _interface(values: list[ir.Value]) -> dict[str, tuple[ir.DataType | None, list[str]]]:
    return {value.name or "": (value.dtype, [str(dim) for dim in value.shape or ()]) for value in values}


def test_inputs_and_outputs_are_named_and_typed_as_promised(llama_fp16: Traced) -> None:
    """Runtimes find ids, mask, positions, past and present by name; dimensions carry the names people look for."""
    graph = load_graph(llama_fp16.model).graph
    half, tokens = ir.DataType.FLOAT16, ir.DataType.INT64
    layers = [(layer, part) for layer in range(2) for part in ("key", "value")]
    past = ["batch", "2", "past", "16"]
    present = ["batch", "2", "past + sequence", "16"]
    assert _interface(list(graph.inputs)) == {
        "input_ids": (tokens, ["batch", "sequence"]),
        "attention_mask": (tokens, ["batch", "total"]),
        "position_ids": (tokens, ["batch", "sequence"]),
        **{f"past_key_values.{layer}.{part}": (half, past) for layer, part in layers},
    }
    assert _interface(list(graph.outputs)) == {
        "logits": (half, ["batch", "sequence", str(VOCAB)]),
        **{f"present.{layer}.{part}": (half, present) for layer, part in layers},
    }


def test_opset_knows_int4(llama_fp32: Traced) -> None:
    """The file imports an opset in which DequantizeLinear takes INT4 blocks, and the checker accepts it."""
    opsets = {
        entry.domain: entry.version for entry in onnx.load(llama_fp32.model, load_external_data=False).opset_import
    }
    assert opsets[""] >= 21
    assert set(opsets) == {""}
    onnx.checker.check_model(str(llama_fp32.model), full_check=True)


@pytest.mark.parametrize(("batch", "sequence"), [(1, 7), (3, 1)])
@pytest.mark.parametrize("model", ["llama_fp32", "opt_fp32"])
def test_logits_equal_torch(request: pytest.FixtureRequest, model: str, batch: int, sequence: int) -> None:
    """Any batch and sequence give the logits of the torch model: no dimension was frozen at its sample size."""
    traced: Traced = request.getfixturevalue(model)
    ids = _ids(batch, sequence)
    expected = torch_logits(traced.checkpoint, ids)
    logits = run(traced.model, causal_feed(traced.model, ids))["logits"]
    np.testing.assert_allclose(logits, expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


@pytest.mark.parametrize("model", ["llama_fp32", "opt_fp32"])
def test_past_continues_a_prompt(request: pytest.FixtureRequest, model: str) -> None:
    """A prompt in two halves, the cache carried by name, gives the logits of the whole: past of 5 and then of 9."""
    traced: Traced = request.getfixturevalue(model)
    ids = _ids(2, 10)
    expected = torch_logits(traced.checkpoint, ids)
    results = run(traced.model, causal_feed(traced.model, ids[:, :5]))
    for start, stop in ((5, 9), (9, 10)):
        past = {
            name.replace("present", "past_key_values"): value for name, value in results.items() if name != "logits"
        }
        assert {value.shape[2] for value in past.values()} == {start}
        results = run(traced.model, causal_feed(traced.model, ids[:, start:stop], past))
        atol = FP32_LOGITS * np.abs(expected).max()
        np.testing.assert_allclose(results["logits"], expected[:, start:stop], rtol=0.0, atol=atol)


def test_mask_hides_left_padding(llama_fp32: Traced) -> None:
    """A padded prompt gives the logits of the prompt alone: the mask and the positions are used."""
    ids = _ids(1, 6)
    expected = run(llama_fp32.model, causal_feed(llama_fp32.model, ids))["logits"]
    feed = causal_feed(llama_fp32.model, np.concatenate([np.full((1, 3), 9), ids], axis=1))
    feed["attention_mask"][:, :3] = 0
    feed["position_ids"] = np.array([[0, 0, 0, *range(6)]])
    logits = run(llama_fp32.model, feed)["logits"][:, 3:]
    np.testing.assert_allclose(logits, expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


def test_rms_norm_is_float32_inside_a_float16_graph(llama_fp16: Traced) -> None:
    """The square of an activation of 300 overflows FP16, so the norm's arithmetic stays FP32 between two casts."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(llama_fp16.model, load_external_data=False))
    graph = ir.from_proto(proto).graph
    nodes = [node for node in graph if node.op_type in RMS_NORM_OPS]
    assert len(nodes) == 5 * len(RMS_NORM_OPS), "five norms"
    assert {node.outputs[0].dtype for node in nodes} == {ir.DataType.FLOAT}


def test_layer_norm_keeps_its_float32_statistics(opt_fp32: Traced) -> None:
    """LayerNormalization computes mean and variance in FP32 whatever the graph's type is (stash_type 1)."""
    norms = [node for node in load_graph(opt_fp32.model).graph if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    assert [node.attributes.get_int("stash_type") for node in norms] == [1] * 5


def test_linears_of_a_half_graph_are_half(llama_fp16: Traced) -> None:
    """FP16 means FP16 weights in every linear: a stray FP32 weight would double the file."""
    graph = load_graph(llama_fp16.model).graph
    dtypes = {linear.path: graph.initializers[linear.weight].dtype for linear in llama_fp16.sites.linears}
    assert set(dtypes.values()) == {ir.DataType.FLOAT16}


def test_bfloat16_trace_runs(llama_fp32: Traced) -> None:
    """A BF16 graph has BF16 weights, cache and logits, and its weights are those of the checkpoint, rounded."""
    traced = traced_once(llama_fp32.checkpoint, "bf16")
    graph = load_graph(traced.model).graph
    assert graph.outputs[0].dtype == ir.DataType.BFLOAT16
    weight = graph.initializers["model.layers.0.mlp.up_proj.weight"].const_value
    exact = load_graph(llama_fp32.model).graph.initializers
    reference = exact["model.layers.0.mlp.up_proj.weight"].const_value
    assert weight is not None
    assert reference is not None
    np.testing.assert_array_equal(weight.numpy(), reference.numpy().astype(weight.numpy().dtype))
    onnx.checker.check_model(str(traced.model))


def test_no_note_of_the_exporter_is_left(llama_fp32: Traced) -> None:
    """Stack traces with paths of the machine that exported do not leave it."""
    proto = onnx.load(llama_fp32.model, load_external_data=False)
    assert not proto.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert not any(value.metadata_props for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output))
    assert b".py" not in llama_fp32.model.read_bytes()


def test_trace_leaves_the_config_alone() -> None:
    """Later stages load the same config: tracing must not switch its attention implementation."""
    from transformers import BertConfig

    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    before = (config._attn_implementation, config.to_dict())
    with pytest.raises(UserError):
        traced_from_config(config, "fp32")
    assert (config._attn_implementation, config.to_dict()) == before


def test_encoder_is_refused() -> None:
    """BERT has a causal class in transformers, but no cache: it cannot decode."""
    from transformers import BertConfig

    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    with pytest.raises(UserError, match=r"keeps no key-value cache"):
        traced_from_config(config, "fp32")


def test_model_without_a_causal_class_is_refused() -> None:
    """An image model is refused with its type, not with transformers' list of a hundred classes."""
    from transformers import ViTConfig

    with pytest.raises(UserError, match=r"'vit'.*not a causal language model") as error:
        traced_from_config(ViTConfig(), "fp32")
    assert len(str(error.value)) < 400


def test_recurrent_model_is_refused() -> None:
    """A state-space model keeps its state elsewhere: a user error, not a traceback from inside torch."""
    from transformers import MambaConfig

    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(UserError, match=r"Mamba"):
        traced_from_config(config, "fp32")
