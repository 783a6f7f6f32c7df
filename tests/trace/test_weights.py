from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fptq_export.errors import UserError
from fptq_export.stored_tensor import StoredTensor
from fptq_export.trace.weights import attach_weights, is_parameter, transpose_linear_weights

KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def _model(dtype: str = "float16", **kinds: str) -> ir.Model:
    """A graph that reads initializers [2, 3] of the given kinds, without values."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({dtype}[2, 3] x) => ({dtype}[2, 3] y)
        <{", ".join(f"{dtype}[2, 3] {name} = {{0, 0, 0, 0, 0, 0}}" for name in kinds)}>
        {{ y = Sum(x, {", ".join(kinds)}) }}"""
    )
    for name, kind in kinds.items():
        model.graph.initializers[name].metadata_props[KIND] = kind
    return model


def _value(model: ir.Model, name: str) -> NDArray[np.generic]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_attaching_reads_nothing(tmp_path: Path) -> None:
    """Weights are read when they are written, so memory does not follow the model: here the file does not exist."""
    model = _model(W="PARAMETER")
    attach_weights(model, {"W": StoredTensor(tmp_path / "absent.safetensors", "W")}, {}, {})
    assert isinstance(model.graph.initializers["W"].const_value, ir.LazyTensor)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_values_are_rounded_once_to_the_graphs_type(tmp_path: Path, stored: type, dtype: str) -> None:
    """Every checkpoint type can be exported to every graph type."""
    values: NDArray[np.generic] = np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3).astype(stored)
    save_file({"key": values}, tmp_path / "model.safetensors")
    model = _model(dtype, W="PARAMETER")
    attach_weights(model, {"W": StoredTensor(tmp_path / "model.safetensors", "key")}, {}, {})
    wanted = model.graph.initializers["W"].dtype
    assert wanted is not None
    np.testing.assert_array_equal(_value(model, "W"), values.astype(wanted.numpy()))


def test_buffers_come_from_the_model(tmp_path: Path) -> None:
    """Rotary frequencies are in no file; a file that has the buffer all the same wins."""
    model = _model(table="BUFFER", stored="BUFFER")
    save_file({"stored": np.full((2, 3), 5, np.float16)}, tmp_path / "model.safetensors")
    buffers = {name: np.full((2, 3), 2.5, np.float32) for name in ("table", "stored")}
    attach_weights(model, {"stored": StoredTensor(tmp_path / "model.safetensors", "stored")}, buffers, {})
    np.testing.assert_array_equal(_value(model, "table"), np.full((2, 3), 2.5, np.float16))
    np.testing.assert_array_equal(_value(model, "stored"), np.full((2, 3), 5, np.float16))


@pytest.mark.parametrize("stored", ["head", "embedding"])
@pytest.mark.parametrize("read", ["head", "embedding"])
def test_tied_parameters_are_found_under_either_name(tmp_path: Path, stored: str, read: str) -> None:
    """Checkpoints keep a tied tensor under one of its two names; the graph may ask for the other."""
    save_file({stored: np.ones((2, 3), np.float16)}, tmp_path / "model.safetensors")
    files: dict[str, StoredTensor] = {stored: StoredTensor(tmp_path / "model.safetensors", stored)}
    model = _model(**{read: "PARAMETER"})
    attach_weights(model, files, {}, {"head": "embedding"})
    np.testing.assert_array_equal(_value(model, read), np.ones((2, 3), np.float16))


def test_tensor_in_no_file_is_named(tmp_path: Path) -> None:
    """The error names the tensor and what to check."""
    with pytest.raises(UserError, match=r"'W'.*no checkpoint file holds it[\s\S]*complete"):
        attach_weights(_model(W="PARAMETER"), {"V": StoredTensor(tmp_path / "f", "V")}, {}, {})


def test_constants_of_the_code_keep_their_value() -> None:
    """A constant that the exporter wrote is no parameter and needs no file."""
    model = _model(c="PARAMETER")
    model.graph.initializers["c"].metadata_props.clear()
    attach_weights(model, {}, {}, {})
    np.testing.assert_array_equal(_value(model, "c"), np.zeros((2, 3), np.float16))
    assert not is_parameter(model.graph.initializers["c"])


def test_tensor_of_another_shape_is_never_written(tmp_path: Path) -> None:
    """The data file is laid out by declared shapes: a tensor of another size would shift all that follow."""
    save_file({"W": np.ones((3, 3), np.float16)}, tmp_path / "model.safetensors")
    model = _model(W="PARAMETER")
    attach_weights(model, {"W": StoredTensor(tmp_path / "model.safetensors", "W")}, {}, {})
    with pytest.raises(RuntimeError, match=r"'W' is float16 \[3, 3\], declared as FLOAT16 \[2, 3\]"):
        _value(model, "W")


def _transposing_model(nodes: str, outputs: str = "y") -> ir.Model:
    promised = ", ".join(f"float[A, B] {name}" for name in outputs.split(", "))
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[T, 3] x, int64[T] i) => ({promised})
        <float[2, 3] W = {{1, 2, 3, 4, 5, 6}}, float[3, 3] S = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}> {{ {nodes} }}"""
    )


def test_weight_of_one_linear_is_stored_transposed() -> None:
    """[out, in] and Transpose become [in, out]; the values move with the shape."""
    model = _transposing_model("t = Transpose<perm = [1, 0]>(W) y = MatMul(x, t)")
    assert transpose_linear_weights(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert model.graph.initializers["W"].shape == [3, 2]
    np.testing.assert_array_equal(_value(model, "W"), [[1, 4], [2, 5], [3, 6]])


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ("t = Transpose<perm = [1, 0]>(W) y = MatMul(x, t) z = Gather(W, i)", "y, z"),
        ("y = Transpose<perm = [1, 0]>(x)", "y"),
        ("t = Transpose<perm = [0, 1]>(S) y = MatMul(x, t)", "y"),
        ("y = MatMul(x, S)", "y"),
    ],
    ids=["tied to an embedding", "an activation", "no transposition", "no Transpose"],
)
def test_other_transposes_are_left_alone(nodes: str, outputs: str) -> None:
    """A tied weight is not doubled on disk, and nothing else is touched."""
    model = _transposing_model(nodes, outputs)
    before = [node.op_type for node in model.graph]
    assert not transpose_linear_weights(model)
    assert [node.op_type for node in model.graph] == before
    assert model.graph.initializers["W"].shape == [2, 3]
