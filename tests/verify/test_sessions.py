from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fptq_export.errors import UserError
from fptq_export.verify.sessions import GraphOptimization, OnnxCausalSession

FP32_TOLERANCE = 64 * 2.0**-23 * 2**3
"""Two FP32 programs for one function: about 64 roundings of 2^-23 on the way, logits below 2^3."""
FP16_TOLERANCE = 8 * 2.0**-10 * 2**3
"""FP16 against FP32: tensors rounded by up to 2^-10 at some 64 places, adding up as sqrt(64), logits below 2^3."""


def test_prefill_equals_torch(tiny_llama: Any) -> None:
    """The session fills mask, positions and an empty past so that logits are those of the torch model."""
    logits, _ = OnnxCausalSession(tiny_llama.fp32, threads=1).prefill(tiny_llama.ids)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, tiny_llama.torch_logits, rtol=0.0, atol=FP32_TOLERANCE)


def test_fp16_graph_gives_float32_logits(tiny_llama: Any) -> None:
    """An FP16 graph gets an FP16 past and gives float32 logits near those of torch in FP32."""
    session = OnnxCausalSession(tiny_llama.fp16, threads=1)
    logits, cache = session.prefill(tiny_llama.ids)
    assert logits.dtype == np.float32
    assert {value.data_type() for value in cache.values.values()} == {"tensor(float16)"}
    np.testing.assert_allclose(logits, tiny_llama.torch_logits, rtol=0.0, atol=FP16_TOLERANCE)


def test_decode_continues_prefill(tiny_llama: Any) -> None:
    """Ten decode steps after a prompt give the logits of one prefill, in a batch of two."""
    session = OnnxCausalSession(tiny_llama.fp32, threads=1)
    ids = tiny_llama.ids
    whole, _ = session.prefill(ids)
    _, cache = session.prefill(ids[:, :14])
    for position in range(14, 24):
        logits, cache = session.decode(ids[:, position : position + 1], cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, position], rtol=0.0, atol=FP32_TOLERANCE)
    assert cache.length == 24


def test_decode_leaves_its_cache_alone(tiny_llama: Any) -> None:
    """A cache can be decoded from twice with the same result."""
    session = OnnxCausalSession(tiny_llama.fp16, threads=1)
    _, cache = session.prefill(tiny_llama.ids)
    token = tiny_llama.ids[:, :1]
    first, _ = session.decode(token, cache)
    session.decode(token + 1, cache)
    second, _ = session.decode(token, cache)
    np.testing.assert_array_equal(first, second)
    assert cache.length == 24


@pytest.mark.parametrize("optimization", ["none", "basic", "extended", "all"])
def test_every_optimization_level_gives_the_same_logits(tiny_llama: Any, optimization: GraphOptimization) -> None:
    """The optimization level is about speed and not about results."""
    logits, _ = OnnxCausalSession(tiny_llama.fp32, threads=1, optimization=optimization).prefill(tiny_llama.ids)
    np.testing.assert_allclose(logits, tiny_llama.torch_logits, rtol=0.0, atol=FP32_TOLERANCE)


def test_session_knows_its_layers_and_name(tiny_llama: Any) -> None:
    """Layers are counted from the cache inputs; the name is the file's unless another is given."""
    session = OnnxCausalSession(tiny_llama.fp32, threads=1)
    assert (session.layers, session.name) == (2, "fp32.onnx")
    assert OnnxCausalSession(tiny_llama.fp32, threads=1, name="FP32").name == "FP32"


def test_prefill_feed_holds_every_input(tiny_llama: Any) -> None:
    """The feed has each graph input in its dtype and shape, the past with length 0."""
    feed = OnnxCausalSession(tiny_llama.fp16, threads=1).prefill_feed(tiny_llama.ids)
    expected = {value.name for value in onnx.load(tiny_llama.fp16, load_external_data=False).graph.input}
    assert feed.keys() == expected
    assert feed["past_key_values.1.value"].shape == (2, 2, 0, 16)
    assert feed["past_key_values.1.value"].dtype == np.float16
    np.testing.assert_array_equal(feed["position_ids"], np.tile(np.arange(24), (2, 1)))
    assert feed["attention_mask"].all()


def test_bfloat16_cache_goes_round(tmp_path: Path) -> None:
    """A BF16 cache and BF16 logits are carried bit for bit, although NumPy has no such type."""
    session = OnnxCausalSession(_counting_graph(tmp_path, TensorProto.BFLOAT16), threads=1)
    logits, cache = session.prefill(np.array([[3, 5, 7]]))
    np.testing.assert_array_equal(logits[0, :, 0], [3.0, 5.0, 7.0])
    _, cache = session.decode(np.array([[9]]), cache)
    assert cache.values["past_key_values.0.key"].shape() == [1, 1, 4, 1]


def test_int32_ids_are_fed_as_int32(tmp_path: Path) -> None:
    """The dtype of the token inputs is the graph's."""
    session = OnnxCausalSession(_counting_graph(tmp_path, TensorProto.FLOAT, TensorProto.INT32), threads=1)
    logits, _ = session.prefill(np.array([[3, 5]]))
    np.testing.assert_array_equal(logits[0, :, 0], [3.0, 5.0])


def test_missing_inputs_and_outputs_are_all_listed(tmp_path: Path, tiny_llama: Any) -> None:
    """One error names every input and output that is missing, and the input nothing fills."""
    model = onnx.load(tiny_llama.fp32, load_external_data=False)
    for value in model.graph.input:
        if value.name in ("position_ids", "past_key_values.1.key"):
            value.name = f"odd_{value.name}"
    del model.graph.output[-1]
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in ("position_ids", "past_key_values.1.key"):
                node.input[index] = f"odd_{name}"
    path = tmp_path / "odd.onnx"
    onnx.save(model, path)
    shutil.copy(f"{tiny_llama.fp32}.data", tmp_path)
    with pytest.raises(UserError) as error:
        OnnxCausalSession(path, threads=1)
    text = str(error.value)
    for problem in (
        "missing input @ position_ids",
        "missing input @ past_key_values.1.key",
        "missing output @ present.1.value",
        "nothing fills @ odd_position_ids",
        "nothing fills @ odd_past_key_values.1.key",
    ):
        assert problem in text, text
    assert str(path) in text
    assert "present.0" not in text


def test_graph_without_a_cache_is_refused(tmp_path: Path) -> None:
    """A graph with ids and logits only is told that the cache is missing."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)],
        "no-cache",
        [value("input_ids", TensorProto.INT64, ["batch", "length"])],
        [value("logits", TensorProto.FLOAT, ["batch", "length"])],
    )
    path = _save(graph, tmp_path / "no_cache.onnx")
    with pytest.raises(
        UserError, match=r"(?s)missing input @ attention_mask.*@ past_key_values\.0\.key.*@ present\.0\.value"
    ):
        OnnxCausalSession(path, threads=1)


def test_wrong_dtype_and_unknown_heads_are_refused(tmp_path: Path) -> None:
    """INT64 keys, and a number of heads the graph does not fix, are named with what the graph says."""
    path = _counting_graph(tmp_path, TensorProto.INT64, heads="heads")
    with pytest.raises(UserError) as error:
        OnnxCausalSession(path, threads=1)
    text = str(error.value)
    assert "input is tensor(int64), not tensor(float)" in text
    assert "['batch', 'heads', 'past', 1] is not [batch, heads, past, head size]" in text


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """A path with nothing there is a user error that names it."""
    with pytest.raises(UserError, match=r"nothing\.onnx: no such file"):
        OnnxCausalSession(tmp_path / "nothing.onnx", threads=1)


def test_garbage_is_refused(tmp_path: Path) -> None:
    """A file that is no ONNX graph is a user error that names it."""
    path = tmp_path / "garbage.onnx"
    path.write_bytes(b"not a graph" * 10)
    with pytest.raises(UserError, match=r"garbage\.onnx: ONNX Runtime cannot open it"):
        OnnxCausalSession(path, threads=1)


def test_missing_weights_are_refused(tmp_path: Path, tiny_llama: Any) -> None:
    """A graph without its data file is a user error that says where to look."""
    path = Path(shutil.copy(tiny_llama.fp32, tmp_path))
    with pytest.raises(UserError, match=r"(?s)cannot open it.*weights file lies beside it"):
        OnnxCausalSession(path, threads=1)


def test_unsupported_kernels_are_refused(tmp_path: Path) -> None:
    """A BF16 computation, for which ONNX Runtime has no CPU kernel, is refused with the reason."""
    path = _counting_graph(
        tmp_path, TensorProto.BFLOAT16, extra=helper.make_node("Mul", ["float_ids", "float_ids"], ["square"])
    )
    with pytest.raises(UserError, match="no CPU kernel"):
        OnnxCausalSession(path, threads=1)


def test_token_outside_the_vocabulary_is_refused(tiny_llama: Any) -> None:
    """A token id the embedding does not have is a user error that names the graph."""
    session = OnnxCausalSession(tiny_llama.fp32, threads=1)
    with pytest.raises(UserError, match=r"fp32\.onnx: ONNX Runtime cannot run it"):
        session.prefill(np.array([[512]]))


def test_verify_needs_no_torch() -> None:
    """Importing the stage imports neither torch nor the PyTorch half."""
    code = "import sys, fptq_export.verify; print([m for m in ('torch', 'calib', 'tensorrt') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _counting_graph(
    directory: Path, dtype: int, ids_dtype: int = TensorProto.INT64, heads: int | str = 1, extra: Any = None
) -> Path:
    """Logits [B, S, 1] are the ids; each token adds a 0 to the cache."""
    value = helper.make_tensor_value_info
    past, present = ["batch", heads, "past", 1], ["batch", heads, "total", 1]
    nodes = [
        helper.make_node("Unsqueeze", ["input_ids", "last"], ["ids"]),
        helper.make_node("Cast", ["ids"], ["float_ids"], to=dtype),
        helper.make_node("Identity", ["float_ids"], ["logits"]),
        helper.make_node("Unsqueeze", ["float_ids", "heads_axis"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
    ]
    if extra is not None:
        nodes += [extra, helper.make_node("Identity", ["square"], ["unused"])]
    outputs = [value("logits", dtype, ["batch", "length", 1])]
    outputs += [value(f"present.0.{kind}", dtype, present) for kind in ("key", "value")]
    if extra is not None:
        outputs.append(value("unused", dtype, None))
    graph = helper.make_graph(
        nodes,
        "counting",
        [value("input_ids", ids_dtype, ["batch", "length"])]
        + [value(name, TensorProto.INT64, ["batch", "total"]) for name in ("attention_mask", "position_ids")]
        + [value(f"past_key_values.0.{kind}", dtype, past) for kind in ("key", "value")],
        outputs,
        [
            helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
            helper.make_tensor("heads_axis", TensorProto.INT64, [1], [1]),
        ],
    )
    return _save(graph, directory / "counting.onnx")


def _save(graph: onnx.GraphProto, path: Path) -> Path:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path
