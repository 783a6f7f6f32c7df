"""Write a safetensors file tensor by tensor: what a model's arrays need in all does not have to fit into memory.

The library writes whole dictionaries. The format allows more: its header lists names, types, shapes and offsets, which
are known before the first value is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fptq_export.files import atomic_path

__all__ = ["TensorSpec", "TensorWriter", "tensor_writer"]

_DTYPE_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",  # ml_dtypes
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor that will be written."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dtype: DTypeLike, *shape: int) -> TensorSpec:
        """`TensorSpec.of("float32", 3, 4)`."""
        return cls(np.dtype(dtype), shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.dtype.itemsize * prod(self.shape)


class TensorWriter:
    """Puts tensors into their places in a file, in any order."""

    def __init__(
        self,
        file: IO[bytes],
        specs: Mapping[str, TensorSpec],
        offsets: Mapping[str, int],
        written: Collection[str] = (),
    ) -> None:
        self._file = file
        self._specs = specs
        self._offsets = offsets
        self._missing = set(specs) - set(written)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Store one tensor.

        Raises:
            ValueError: It has another type or shape than was announced, or was written before.
            OSError: With the cause, a full disk among them.
        """
        spec = self._specs[name]
        if (values.dtype, values.shape) != (spec.dtype, spec.shape):
            raise ValueError(f"{name}: {values.dtype} {values.shape} instead of {spec.dtype} {spec.shape}")
        if name not in self._missing:
            raise ValueError(f"{name}: written twice")
        self._file.seek(self._offsets[name])
        # Not numpy's tofile: its error for a full disk does not say that the disk is full.
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._file.flush()
        self._missing.remove(name)

    def check_complete(self) -> None:
        """Raise ValueError if a tensor that was announced never came."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, among them {min(self._missing)}")


@contextmanager
def tensor_writer(
    path: Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None = None,
    *,
    draft: Path | None = None,
    written: Collection[str] = (),
) -> Iterator[TensorWriter]:
    """Open a file; it appears under its name when the block ends and every tensor came.

    Equal specs and values give equal bytes, in whatever order the tensors are written.

    Args:
        path: Where the file goes.
        specs: Every tensor of the file.
        metadata: Words that the file carries.
        draft: Where it lies until it is complete, on the same disk; it stays there after a failure. By default a
            temporary name beside `path`, which is removed.
        written: Tensors that an earlier process put into the draft. Specs and metadata are those of that process.

    Raises:
        ValueError: A tensor that was announced never came.
    """
    # Wide types first, as the library has them, so that every tensor is aligned.
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    ends = list(accumulate(specs[name].nbytes for name in order))
    begins = [0, *ends][: len(order)]
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    entries.update({
        name: {
            "dtype": _DTYPE_NAMES[specs[name].dtype.name],
            "shape": list(specs[name].shape),
            "data_offsets": [begin, end],
        }
        for name, begin, end in zip(order, begins, ends, strict=True)
    })  # fmt: skip
    header = json.dumps(entries, ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    start = 8 + len(header)
    with atomic_path(path) if draft is None else _kept(draft, path) as partial:
        with partial.open("r+b" if written else "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(start + (ends[-1] if ends else 0))
            offsets = {name: start + begin for name, begin in zip(order, begins, strict=True)}
            writer = TensorWriter(file, specs, offsets, written)
            yield writer
        writer.check_complete()


@contextmanager
def _kept(draft: Path, path: Path) -> Iterator[Path]:
    """As `atomic_path`, but the draft has a place of its own and stays after a failure."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    yield draft
    draft.replace(path)
