"""ONNX files that cannot be worked with are refused in words, everything that is wrong at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from fptq_export.errors import UserError, UserErrors
from fptq_export.trace.check_onnx import check_onnx, files_of_onnx, opened_onnx
from tests.support.onnx_graphs import GraphBuilder, mlp_graph


def saved(proto: onnx.ModelProto, directory: Path) -> Path:
    """Write a file."""
    path = directory / "user.onnx"
    onnx.save(proto, str(path))
    return path


def with_operator(op_type: str, domain: str, *inputs: str) -> onnx.ModelProto:
    """A graph with one operator of a domain, opset 17."""
    graph = GraphBuilder()
    graph.op(op_type, list(inputs), "odd", "y", domain=domain)
    model = graph.model({"x": [4, 4]}, {"y": [4, 4]})
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def test_float_graph_is_accepted(tmp_path: Path) -> None:
    """Nothing is wrong with it; it is one file."""
    path = saved(mlp_graph(), tmp_path)
    check_onnx(path)
    assert files_of_onnx(opened_onnx(path), path) == (path,)


def test_data_files_are_listed(tmp_path: Path) -> None:
    """A run depends on them too."""
    path = tmp_path / "user.onnx"
    onnx.save(mlp_graph(), str(path), save_as_external_data=True, location="user.data", size_threshold=0)
    assert files_of_onnx(opened_onnx(path), path) == (path, tmp_path / "user.data")


def test_old_opset_and_custom_operator_are_reported_together(tmp_path: Path) -> None:
    """Each with the place in the file."""
    model = with_operator("Swish", "acme", "x")
    model.opset_import[0].version = 6
    with pytest.raises(UserErrors) as caught:
        check_onnx(saved(model, tmp_path))
    assert [problem.path for problem in caught.value.problems] == ["opset_import", "graph.node 'odd'"]
    assert "custom operator acme::Swish" in str(caught.value)
    assert "opset 6 is older than 7" in str(caught.value)


def test_missing_opset_is_refused(tmp_path: Path) -> None:
    """Nobody can say what the operators mean."""
    model = mlp_graph()
    del model.opset_import[:]
    with pytest.raises(UserError, match="opset_import does not give a version"):
        check_onnx(saved(model, tmp_path))


@pytest.mark.parametrize(("size", "cause"), [(None, "no such file; it holds "), (100, "100 bytes, but .* was cut off")])
def test_data_file_that_is_not_whole_is_refused(size: int | None, cause: str, tmp_path: Path) -> None:
    """It is named, with a weight that lies in it."""
    path, data = tmp_path / "user.onnx", tmp_path / "user.data"
    onnx.save(mlp_graph(), str(path), save_as_external_data=True, location=data.name, size_threshold=0)
    if size is None:
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"user\.data: {cause}"):
        opened_onnx(path)


def test_operator_that_is_a_function_of_the_model_is_no_custom_operator(tmp_path: Path) -> None:
    """It has a body, so everybody can run it."""
    model = with_operator("Twice", "acme", "x")
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    model.functions.append(helper.make_function("acme", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    path = saved(model, tmp_path)
    check_onnx(path)
    assert opened_onnx(path).functions


def test_linked_weights_are_refused_before_anything_reads_them(tmp_path: Path) -> None:
    """As a cache of downloads lays them out: a link beside the graph to a file elsewhere."""
    directory, elsewhere = tmp_path / "snapshot", tmp_path / "blob"
    directory.mkdir()
    path = directory / "user.onnx"
    onnx.save(mlp_graph(), path, save_as_external_data=True, location="user.data", size_threshold=0)
    (directory / "user.data").rename(elsewhere)
    (directory / "user.data").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"user\.data: the data of .* lies outside the graph's directory"):
        opened_onnx(path)


def test_quantized_graph_is_refused(tmp_path: Path) -> None:
    """Codes are made from float weights."""
    graph = GraphBuilder()
    scale = graph.constant("s", np.float32(0.1))
    codes = graph.op("QuantizeLinear", ["x", scale], "quantize")
    graph.op("DequantizeLinear", [codes, scale], "dequantize", "y")
    with pytest.raises(UserErrors, match="QuantizeLinear: the model is quantized already"):
        check_onnx(saved(graph.model({"x": [4]}, {"y": [4]}), tmp_path))


def test_opset_that_is_too_old_is_refused(tmp_path: Path) -> None:
    """No converter knows it."""
    with pytest.raises(UserErrors, match="opset 6 is older than 7"):
        check_onnx(saved(GraphBuilder().model({"x": [4]}, {"x": [4]}, opset=6), tmp_path))


def test_what_the_checker_finds_is_passed_on(tmp_path: Path) -> None:
    """An input that nothing gives is named."""
    with pytest.raises(UserErrors, match="nowhere"):
        check_onnx(saved(with_operator("Relu", "", "nowhere"), tmp_path))


@pytest.mark.parametrize(("content", "cause"), [(b"PK\x03\x04", "not a readable ONNX file"), (None, "no such file")])
def test_file_that_is_no_onnx_is_refused(content: bytes | None, cause: str, tmp_path: Path) -> None:
    """The error names it."""
    path = tmp_path / "user.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"user\.onnx: {cause}"):
        check_onnx(path)
