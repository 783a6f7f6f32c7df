"""Input data for a graph: NumPy files, checked whole before anything long starts, read one file at a time.

One file is one batch. `.npz`: an array for each input of the graph, by its name. `.npy`: the array of a graph with one
input. A directory is as many batches as it has such files, in the order of their names.

A file may hold more samples than one batch, along the first axis of all its arrays: where the graph fixes the first
dimension of every input to one size, or `--batch-size` gives one, it is cut into batches of that size.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export.errors import Problem, UserError, UserErrors

__all__ = ["Batch", "GraphData", "GraphInput", "data_from_path", "files_from_path", "inputs_from_graph"]

Batch = Mapping[str, NDArray[Any]]
"""Array of each input, by name."""
_SUFFIXES = (".npz", ".npy")
_READ_ERRORS = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile)
"""What NumPy raises for a damaged file, and for one that would run code (`allow_pickle`)."""


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...]
    """A size, a symbol, or None where the graph says nothing."""


@dataclass(frozen=True)
class GraphData:
    """Batches on disk; all of them fit the graph."""

    files: tuple[Path, ...]
    inputs: tuple[GraphInput, ...]
    samples: int | None
    """Samples of a batch, where files are cut; None where a file is a batch."""
    count: int
    """Batches."""
    name: str
    """What the user called it."""

    @property
    def description(self) -> str:
        """For reports: where it comes from and how much there is."""
        return f"{self.name}: {self.count} batch{'es' if self.count != 1 else ''}"

    def batches(self) -> Iterator[Batch]:
        """Every batch; one file is in memory at a time."""
        for file in self.files:
            arrays = _arrays(file, self.inputs)
            yield from ({name: arrays[name][part] for name in arrays} for part in _parts(arrays, self.samples))


def inputs_from_graph(model: ir.Model) -> tuple[GraphInput, ...]:
    """What a caller gives: inputs without those that an initializer fills."""
    return tuple(
        GraphInput(value.name or "", value.dtype.numpy(), _dims(value.shape))
        for value in model.graph.inputs
        if value.name not in model.graph.initializers and value.dtype is not None
    )


def data_from_path(path: Path, option: str, inputs: Sequence[GraphInput], batch_size: int = 0) -> GraphData:
    """Find the files and read each of them once.

    Args:
        path: `.npz` or `.npy` file, or a directory of them.
        option: Its option, for errors.
        inputs: What the graph takes.
        batch_size: Samples of a batch for graphs that do not fix them; 0 leaves files as they are.

    Raises:
        UserError: There is no such file, or the graph has another batch size.
        UserErrors: Missing and unknown names, wrong types, ranks and sizes, NaN and infinite values: all of all files.
    """
    files = files_from_path(path, option)
    fixed = {item.dims[0] if item.dims else None for item in inputs}
    first = next(iter(fixed)) if len(fixed) == 1 else None
    samples = first if isinstance(first, int) else (batch_size or None)
    if batch_size and samples != batch_size:
        raise UserError(f"--batch-size {batch_size}", f"the graph fixes its batch to {samples}", "leave it out")
    problems, count = [], 0
    for file in files:
        try:
            arrays = _arrays(file, inputs)
        except _READ_ERRORS as error:
            problems.append(Problem(str(file), f"not a readable NumPy file ({error})"))
            continue
        problems += [Problem(f"{file}: {item.path}", item.message) for item in _array_problems(arrays, inputs, samples)]
        count += len(_parts(arrays, samples))
    if problems:
        wanted = ", ".join(f"{item.name}: {item.dtype} {_shape_text(item.dims)}" for item in inputs)
        raise UserErrors(f"{option} {path}", problems, f"the graph takes {wanted}")
    return GraphData(tuple(files), tuple(inputs), samples, count, path.name)


def _dims(shape: ir.Shape | None) -> tuple[int | str | None, ...]:
    dims = list(shape) if shape is not None else []
    return tuple(dim if isinstance(dim, int) else dim.value for dim in dims)


def files_from_path(path: Path, option: str) -> list[Path]:
    """The files that a path stands for: itself, or the NumPy files of a directory in the order of their names.

    Raises:
        UserError: There is none.
    """
    if path.is_file() and path.suffix in _SUFFIXES:
        return [path]
    hint = "give a .npz file with an array for each input, or a directory of such files, one a batch"
    if not path.is_dir():
        cause = "neither a .npz nor a .npy file" if path.exists() else "no such file or directory"
        raise UserError(f"{option} {path}", cause, hint)
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise UserError(f"{option} {path}", "the directory holds no .npz and no .npy file", hint)
    return files


def _arrays(file: Path, inputs: Sequence[GraphInput]) -> dict[str, NDArray[Any]]:
    """Every array of a file; that of a `.npy` file belongs to the only input."""
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if len(inputs) != 1:
            raise ValueError(f"a .npy file has one array, and the graph takes {len(inputs)}: write .npz files")
        return {inputs[0].name: loaded}
    with loaded:
        return {name: loaded[name] for name in loaded.files}


def _parts(arrays: Batch, samples: int | None) -> list[slice | EllipsisType]:
    """Slices of the first axis that are a batch each; `...` where all of a file is one."""
    lengths = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    length = next(iter(lengths)) if len(lengths) == 1 else 0
    if samples is None or length <= samples:
        return [...]
    return [slice(start, start + samples) for start in range(0, length, samples)]


def _array_problems(arrays: Batch, inputs: Sequence[GraphInput], samples: int | None) -> Iterator[Problem]:
    named = {item.name: item for item in inputs}
    yield from (Problem(name, "the graph has no such input") for name in arrays if name not in named)
    symbols: dict[str, tuple[int, str]] = {}
    parts = _parts({name: array for name, array in arrays.items() if name in named}, samples)
    for name, item in named.items():
        if name not in arrays:
            yield Problem(name, "is missing")
            continue
        array = arrays[name]
        if array.dtype != item.dtype:
            yield Problem(name, f"is {array.dtype}, not {item.dtype}: write it with .astype({item.dtype.name!r})")
        elif not np.isfinite(array).all():
            yield Problem(name, "has NaN or infinite values")
        if array.ndim != len(item.dims):
            yield Problem(name, f"has shape {list(array.shape)}, not {len(item.dims)} dimensions")
            continue
        last = array[parts[-1]]
        for axis, (size, wanted) in enumerate(zip(last.shape, item.dims, strict=True)):
            if isinstance(wanted, int) and size != wanted:
                takes = f"takes {wanted} at a time" if len(parts) > 1 and axis == 0 else f"fixes it to {wanted}"
                yield Problem(name, f"dimension {axis} is {array.shape[axis]}, the graph {takes}")
            elif isinstance(wanted, str):
                known, where = symbols.setdefault(wanted, (size, name))
                if known != size:
                    yield Problem(name, f"dimension {axis}, {wanted!r}, is {size} here and {known} in {where!r}")


def _shape_text(dims: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"
