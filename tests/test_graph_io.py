from __future__ import annotations

import functools
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import data_path, lazy_tensor, load_graph, save_graph, write_weights
from fptq_export.packing import packed_from_int4
from tests.support.process_memory import is_mapped

SMALL, LARGE = (16,), (32, 16)
"""64 bytes and 2048 bytes of float32: below and above what stays in the .onnx file."""


def _model(*sizes: tuple[int, ...]) -> ir.Model:
    """A graph that adds up initializers c0, c1, ... filled with their number."""
    values = []
    for index, shape in enumerate(sizes):
        value = ir.Value(name=f"c{index}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        make = functools.partial(np.full, shape, index, np.float32)
        value.const_value = lazy_tensor(f"c{index}", ir.DataType.FLOAT, shape, make)
        values.append(value)
    x = ir.Value(name="x", shape=ir.Shape(["n", 16]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Sum", [x, *values], name="sum")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["n", 16])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def test_large_tensors_go_to_the_data_file(tmp_path: Path) -> None:
    """Small ones stay where tools print them; the rest is written once, in order, without gaps."""
    model = _model(SMALL, LARGE, LARGE)
    path = tmp_path / "model.onnx"
    done: list[tuple[int, int]] = []
    write_weights(model, data_path(path), lambda *count: done.append(count))
    save_graph(model, path)
    assert done == [(1, 2), (2, 2)]
    stored = np.fromfile(data_path(path), np.float32)
    np.testing.assert_array_equal(stored, np.repeat([1, 2], 512))
    loaded = load_graph(path).graph.initializers
    kinds = {name: isinstance(value.const_value, ir.ExternalTensor) for name, value in loaded.items()}
    assert kinds == {"c0": False, "c1": True, "c2": True}
    onnx.checker.check_model(str(path))


def test_graph_names_its_data_by_file_name(tmp_path: Path) -> None:
    """The pair can be moved: no directory is stored."""
    path = tmp_path / "model.onnx"
    model = _model(LARGE)
    write_weights(model, data_path(path))
    save_graph(model, path)
    (tensor,) = onnx.load(path, load_external_data=False).graph.initializer
    assert {entry.key: entry.value for entry in tensor.external_data}["location"] == "model.onnx.data"


def test_model_with_small_tensors_only_is_read_back(tmp_path: Path) -> None:
    """An empty data file is no obstacle."""
    path = tmp_path / "model.onnx"
    model = _model(SMALL)
    write_weights(model, data_path(path))
    save_graph(model, path)
    assert data_path(path).stat().st_size == 0
    tensor = load_graph(path).graph.initializers["c0"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.zeros(16, np.float32))


def test_tensors_are_made_once_and_not_kept() -> None:
    """A lazy tensor computes when it is asked and forgets, so memory holds one weight at a time."""
    made = []

    def make() -> NDArray[np.generic]:
        made.append(1)
        return np.zeros(LARGE, np.float32)

    tensor = lazy_tensor("w", ir.DataType.FLOAT, LARGE, make)
    assert (tensor.nbytes, made) == (2048, [])
    tensor.numpy()
    tensor.numpy()
    assert len(made) == 2


def test_writing_makes_each_tensor_once(tmp_path: Path) -> None:
    """Nothing is computed twice on the way to the disk."""
    made = []

    def make() -> NDArray[np.generic]:
        made.append(1)
        return np.zeros(LARGE, np.float32)

    model = _model(LARGE)
    model.graph.initializers["c0"].const_value = lazy_tensor("c0", ir.DataType.FLOAT, LARGE, make)
    write_weights(model, tmp_path / "d")
    save_graph(model, tmp_path / "m.onnx")
    assert len(made) == 1


def test_int4_takes_half_a_byte(tmp_path: Path) -> None:
    """4-bit tensors are 4 bits in the data file, in the order of `packing`."""
    codes = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(np.int8)
    model = _model(SMALL)
    value = ir.Value(name="w", shape=ir.Shape((64, 64)), type=ir.TensorType(ir.DataType.INT4))
    value.const_value = lazy_tensor("w", ir.DataType.INT4, (64, 64), lambda: packed_from_int4(codes.reshape(-1)))
    model.graph.register_initializer(value)
    write_weights(model, tmp_path / "d")
    np.testing.assert_array_equal(np.fromfile(tmp_path / "d", np.uint8), packed_from_int4(codes).reshape(-1))


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.float32), np.zeros(LARGE, np.float16)], ids=["shape", "dtype"])
def test_tensor_that_is_not_what_was_declared_is_refused(tmp_path: Path, array: NDArray[np.generic]) -> None:
    """Places in the file are given out by the declaration: a wrong tensor would shift all that follow."""
    model = _model(LARGE)
    model.graph.initializers["c0"].const_value = lazy_tensor("c0", ir.DataType.FLOAT, LARGE, lambda: array)
    with pytest.raises(RuntimeError, match=r"'c0' is .*, declared as FLOAT \[32, 16\]"):
        write_weights(model, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def _write(model: ir.Model, directory: Path) -> None:
    write_weights(model, directory / "weights" / "model.onnx.data")
    save_graph(model, directory / "graph" / "model.onnx")


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_user_errors_of_a_tensor_reach_the_user(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """What a lazy tensor refuses is told as it is, wherever the tensor is stored, and no graph is left."""

    def refuse() -> NDArray[np.generic]:
        raise UserError("fold site model.norm", "overflows")

    model = _model(shape)
    model.graph.initializers["c0"].const_value = lazy_tensor("c0", ir.DataType.FLOAT, shape, refuse)
    with pytest.raises(UserError, match=r"fold site model\.norm: overflows"):
        _write(model, tmp_path)
    assert not (tmp_path / "graph").exists()


def test_other_errors_of_a_tensor_stay_what_they_are(tmp_path: Path) -> None:
    """A bug keeps its cause, for the traceback."""

    def fail() -> NDArray[np.generic]:
        raise ZeroDivisionError

    model = _model(SMALL)
    model.graph.initializers["c0"].const_value = lazy_tensor("c0", ir.DataType.FLOAT, SMALL, fail)
    with pytest.raises(ir.serde.SerdeError) as error:
        save_graph(model, tmp_path / "m.onnx")
    causes: list[BaseException | None] = [error.value]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__)
    assert isinstance(causes[-2], ZeroDivisionError)


def test_missing_graph_is_refused(tmp_path: Path) -> None:
    """The error says which stage to run."""
    with pytest.raises(UserError, match=r"model\.onnx: no such file[\s\S]*run the stage"):
        load_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_graph_is_refused(tmp_path: Path, kept: float) -> None:
    """A file that was cut off names itself."""
    path = tmp_path / "model.onnx"
    save_graph(_model(SMALL, SMALL), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"model\.onnx: not a readable ONNX file"):
        load_graph(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"PK\x03\x04 not a graph"])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty file parses as a protobuf without a graph: still no ONNX file."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx: not a readable ONNX file"):
        load_graph(path)


@pytest.mark.parametrize(
    ("domain", "named"), [("", "ai.onnx"), ("com.example", "com.example")], ids=["standard", "custom"]
)
def test_operators_of_no_version_are_refused(domain: str, named: str, tmp_path: Path) -> None:
    """What an operator does depends on its opset: no version is guessed, in a branch neither."""
    body = f"{f'{domain}.' if domain else ''}Relu(x)"
    imports = {"": 21, "com.example": 1}
    opsets = ", ".join(f'"{name}" : {version}' for name, version in imports.items())
    text = f"""<ir_version: 10, opset_import: [{opsets}]> g (float[n] x, bool c) => (float[n] y) {{
        y = If(c) <a = t () => (float[n] u) {{ u = {body} }}, b = e () => (float[n] v) {{ v = Neg(x) }}> }}"""
    proto = onnx.parser.parse_model(text)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    load_graph(path)
    kept = [entry for entry in proto.opset_import if entry.domain != domain]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    onnx.save(proto, path)
    with pytest.raises(UserError, match=f"operators of {named}, but opset_import"):
        load_graph(path)


def test_standard_operators_may_be_imported_by_name(tmp_path: Path) -> None:
    """`ai.onnx` is the empty domain: such a graph is opened, and passes find its version where they look for it."""
    path = tmp_path / "model.onnx"
    save_graph(_model(SMALL), path)
    proto = onnx.load(path)
    proto.opset_import[0].domain = "ai.onnx"
    onnx.save(proto, path)
    assert dict(load_graph(path).opset_imports) == {"": 21}


def test_stored_weights_stay_mapped_only_while_they_are_held(tmp_path: Path) -> None:
    """A tensor that kept what was read would hold the whole model after one pass over it."""
    path = tmp_path / "model.onnx"
    model = _model(LARGE)
    write_weights(model, data_path(path))
    save_graph(model, path)
    for opened in (model, load_graph(path)):
        tensor = opened.graph.initializers["c0"].const_value
        assert tensor is not None
        array = tensor.numpy()
        assert is_mapped(data_path(path))
        np.testing.assert_array_equal(array, np.zeros(LARGE, np.float32))
        del array
        assert not is_mapped(data_path(path))
        assert tensor.tobytes() == bytes(2048)
        np.testing.assert_array_equal(np.asarray(tensor), np.zeros(LARGE, np.float32))
        assert not is_mapped(data_path(path))


def test_unpacked_codes_are_not_kept(tmp_path: Path) -> None:
    """INT4 codes take a byte each once they are read: twice their file, if they stayed."""
    path = tmp_path / "model.onnx"
    codes = np.arange(-8, 8, dtype=np.int8).repeat(256)
    value = ir.Value(name="codes", shape=ir.Shape((64, 64)), type=ir.TensorType(ir.DataType.INT4))
    value.const_value = lazy_tensor("codes", ir.DataType.INT4, (64, 64), lambda: packed_from_int4(codes))
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}, name="g")
    write_weights(ir.Model(graph, ir_version=10), data_path(path))
    tensor = value.const_value
    assert tensor is not None
    reference = weakref.ref(tensor.numpy())
    assert reference() is None
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8).reshape(-1), codes)


def test_place_of_external_data_is_left_alone(tmp_path: Path) -> None:
    """Whoever reads the graph looks for its data where the file says, also in a directory below."""
    path = tmp_path / "model.onnx"
    model = _model(LARGE)
    write_weights(model, tmp_path / "below" / "weights.bin")
    save_graph(model, path)
    proto = onnx.load(path, load_external_data=False)
    (entry,) = (entry for entry in proto.graph.initializer[0].external_data if entry.key == "location")
    entry.value = "below/weights.bin"
    onnx.save(proto, path)
    tensor = load_graph(path).graph.initializers["c0"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.location == "below/weights.bin"
    np.testing.assert_array_equal(tensor.numpy(), np.zeros(LARGE, np.float32))


def _written(directory: Path) -> Path:
    """A graph of two external tensors and its data file; gives the data file."""
    path = directory / "model.onnx"
    model = _model(LARGE, LARGE)
    write_weights(model, data_path(path))
    save_graph(model, path)
    return data_path(path)


def _linked(data: Path, elsewhere: Path) -> None:
    (elsewhere / "other").hardlink_to(data)


def _outside(data: Path, elsewhere: Path) -> None:
    data.rename(elsewhere / "other")
    data.symlink_to(elsewhere / "other")


def _tobytes(tensor: ir.TensorProtocol) -> object:
    return tensor.tobytes()


def _written_again(tensor: ir.TensorProtocol) -> object:
    with tempfile.TemporaryDirectory() as directory:
        return ir.external_data.convert_tensors_to_external([tensor], directory, "copy.data")


@pytest.mark.parametrize("read", [np.asarray, _tobytes, _written_again], ids=["array", "bytes", "file"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_linked, r"this data file has a second name \(hard link\)"),
        (_outside, r"the data of 'c0' lies outside the graph's directory"),
    ],
)
def test_data_file_of_another_place_is_refused_when_read(
    tmp_path: Path, damage: Callable[[Path, Path], None], reason: str, read: Callable[[ir.TensorProtocol], object]
) -> None:
    """The user's to mend, however the weights are read; the graph alone can still be looked at."""
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.mkdir()
    damage(_written(directory), elsewhere)
    tensor = load_graph(directory / "model.onnx").graph.initializers["c0"].const_value
    assert tensor is not None
    with pytest.raises(UserError, match=rf"model\.onnx\.data: {reason}"):
        read(tensor)


def test_data_file_that_is_a_link_inside_its_directory_is_read(tmp_path: Path) -> None:
    """A symbolic link that stays beside the graph is no escape."""
    data = _written(tmp_path)
    data.rename(tmp_path / "other")
    data.symlink_to("other")
    tensor = load_graph(tmp_path / "model.onnx").graph.initializers["c1"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.ones(LARGE, np.float32))
