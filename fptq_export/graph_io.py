"""ONNX graphs whose weights stay on disk: opened by memory map, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export.errors import FptqError, UserError
from fptq_export.files import atomic_path

__all__ = ["DATA_SUFFIX", "check_data_file", "data_path", "lazy_tensor", "load_graph", "save_graph", "write_weights"]

DATA_SUFFIX = ".data"
_STANDARD = "ai.onnx"
_INLINE_BYTES = 1024
"""Initializers up to this size stay in the .onnx file, where tools print them."""

OnTensor = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""


class _StoredTensor(ir.ExternalTensor):
    """A tensor in a data file that keeps nothing of what is read.

    The library's keeps the memory map, and unpacked values where an element is narrower than a byte. A pass that reads
    every weight once would end with the whole model in memory.
    """

    __slots__ = ()

    @classmethod
    def like(cls, tensor: ir.ExternalTensor, location: str, directory: str, name: str) -> _StoredTensor:
        """`tensor`, with another name or in another file."""
        place = (location, tensor.offset, tensor.length, tensor.dtype)
        return cls(*place, shape=tensor.shape, name=name, base_dir=directory)

    def _anew(self) -> ir.ExternalTensor:
        place = (self.location, self.offset, self.length, self.dtype)
        return ir.ExternalTensor(*place, shape=self.shape, name=self.name, base_dir=self.base_dir)

    def numpy(self) -> NDArray[np.generic]:
        """The values, mapped from the file for as long as somebody holds them.

        This and the two below raise UserError as `check_data_file` does.
        """
        check_data_file(self)
        array: NDArray[np.generic] = self._anew().numpy()
        return array

    def tobytes(self) -> bytes:
        """The bytes, read anew."""
        check_data_file(self)
        return self._anew().tobytes()

    def tofile(self, file: Any) -> None:
        """Copy the bytes into another file."""
        check_data_file(self)
        super().tofile(file)

    def __array__(self, dtype: Any = None) -> NDArray[np.generic]:
        return np.asarray(self.numpy(), dtype)


def data_path(onnx_path: Path) -> Path:
    """`model.onnx` -> `model.onnx.data`."""
    return onnx_path.with_name(onnx_path.name + DATA_SUFFIX)


def load_graph(path: Path) -> ir.Model:
    """Open a graph; its external weights stay on disk until read.

    What is wrong with a data file is no error yet: a lowered graph may leave its weights beside another one, and who
    looks at the graph alone needs none.

    Raises:
        UserError: The graph cannot be read, or does not say which version of an operator set it uses.
    """
    if not path.is_file():
        raise UserError(str(path), "no such file", "run the stage that writes it first")
    try:
        model = ir.load(str(path))
    except Exception as error:
        # protobuf raises a DecodeError class that differs between its C and Python implementations.
        raise UserError(str(path), f"not a readable ONNX file ({error})", "export the model again") from error
    if not model.graph.outputs:
        # An empty file, or one cut off between two fields, is a valid protobuf.
        raise UserError(str(path), "not a readable ONNX file (it holds no graph)", "export the model again")
    _check_opsets(model, path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = _StoredTensor.like(tensor, str(tensor.location), str(tensor.base_dir), tensor.name)
    return model


def _check_opsets(model: ir.Model, path: Path) -> None:
    imports = model.opset_imports
    if _STANDARD in imports:  # the other name of the empty domain, which onnx_ir gives to nodes but not to imports
        imports.setdefault("", imports.pop(_STANDARD))
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    missing = sorted(domain or _STANDARD for domain in used - imports.keys())
    if missing:
        cause = f"has operators of {', '.join(missing)}, but opset_import does not give a version of it"
        raise UserError(str(path), cause, "export the model again")


def check_data_file(tensor: ir.ExternalTensor) -> None:
    """Refuse a data file that is not the graph's own, which onnx_ir refuses too, but as if it were a bug.

    Raises:
        UserError: It lies outside the graph's directory, or has a second name (hard link).
    """
    file, directory = Path(tensor.path), Path(tensor.base_dir)
    if not file.resolve().is_relative_to(directory.resolve()):
        reason = f"the data of {tensor.name!r} lies outside the graph's directory"
        raise UserError(str(file), reason, "put the data file beside the .onnx file")
    if file.is_file() and file.stat().st_nlink > 1:
        reason = "this data file has a second name (hard link), so another place could change it"
        raise UserError(str(file), reason, "copy the directory without links (cp -r)")


def lazy_tensor(
    name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], NDArray[np.generic]]
) -> ir.LazyTensor:
    """An initializer that is computed when it is written, and not kept.

    Args:
        name: Name of the initializer.
        dtype: Element type of the result; `make` returns packed bytes (uint8) for 4-bit types.
        shape: Logical shape.
        make: Computes the array.
    """

    def evaluate() -> ir.TensorProtocol:
        array = make()
        if dtype.bitwidth == 4:
            return ir.PackedTensor(array, dtype, shape=list(shape), name=name)
        # The place in the file was given out by the declared shape: another one would shift every later tensor.
        if array.shape != shape or array.dtype != dtype.numpy():
            raise RuntimeError(f"{name!r} is {array.dtype} {list(array.shape)}, declared as {dtype} {list(shape)}")
        return ir.Tensor(array, dtype=dtype, shape=ir.Shape(shape), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def write_weights(model: ir.Model, target: Path, on_tensor: OnTensor | None = None) -> None:
    """Write the large initializers of a graph to one data file and point the graph at it.

    Args:
        model: Changed in place: large initializers become references to `target`.
        target: Data file; written under a temporary name and renamed.
        on_tensor: Progress callback.
    """
    values = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > _INLINE_BYTES
    ]
    done = 0

    def report(_tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        nonlocal done
        done += 1
        if on_tensor is not None:
            on_tensor(done, info.total)

    with atomic_path(target) as partial:
        tensors = [value.const_value for value in values if value.const_value is not None]
        written = ir.external_data.convert_tensors_to_external(
            tensors, str(partial.parent), partial.name, callback=report
        )
    for value, tensor in zip(values, written, strict=True):
        value.const_value = _StoredTensor.like(tensor, target.name, str(target.parent), value.name or "")


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph itself in one step; external weights stay where they are, beside it."""
    proto = _proto_from_graph(model)
    with atomic_path(path) as partial:
        onnx.save(proto, str(partial), format="protobuf")


def _proto_from_graph(model: ir.Model) -> onnx.ModelProto:
    try:
        return ir.to_proto(model)
    except ir.serde.SerdeError as error:
        # The library wraps what a lazy tensor raises, once for each level of the graph.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, FptqError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
