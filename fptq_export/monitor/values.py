"""Collected values of the output `range_monitor`: files in, calls out."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.range_outputs import COLUMNS, OUTPUT_NAME

__all__ = ["SUFFIXES", "calls_from_file"]

SUFFIXES = (".npz", ".npy", ".jsonl")
_HINT = f"collect the output {OUTPUT_NAME!r} of the graph of this run, and store it as it is"


def calls_from_file(path: Path, rows: int) -> Iterator[NDArray[np.float64]]:
    """The calls of a file, in order; one array, or one line, is in memory at a time.

    Args:
        path: `.npy` holds an array; `.npz` several, of which `range_monitor` alone is read where one is called so;
            `.jsonl` a list a line, or an object with a list under `range_monitor`.
        rows: Rows of the output. An array is one call, [rows, 3], or several, [calls, rows, 3].

    Yields:
        float64 [calls, rows, 3].

    Raises:
        UserError: The file cannot be read, or holds something else; names the array or the line.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(str(path), "is of no known format", f"give {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(str(path), "no such file", _HINT)
    arrays = _from_lines(path) if path.suffix == ".jsonl" else _from_numpy(path)
    for where, array in arrays:
        yield _checked(where, array, rows)


def _from_numpy(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            yield str(path), loaded
            return
        with loaded:
            for name in [OUTPUT_NAME] if OUTPUT_NAME in loaded.files else loaded.files:
                yield f"{path}, array {name!r}", loaded[name]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(str(path), f"cannot be read ({error})", "write it with numpy.save or numpy.savez") from None


def _from_lines(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                found = json.loads(line)
                yield where, np.array(found[OUTPUT_NAME] if isinstance(found, dict) else found, np.float64)
            except (ValueError, TypeError, KeyError) as error:
                cause = f"is not a list of rows, nor an object with one under {OUTPUT_NAME!r} ({error})"
                raise UserError(where, cause, "write json.dumps(rows.tolist()), one call a line") from None


def _checked(where: str, array: NDArray[Any], rows: int) -> NDArray[np.float64]:
    """The array as [calls, rows, 3].

    Raises:
        UserError: It has another shape or type, or numbers that the output cannot have.
    """
    columns = len(COLUMNS)
    if array.shape[-2:] != (rows, columns) or array.ndim not in (2, 3) or array.dtype.kind != "f":
        cause = f"is {array.dtype} {list(array.shape)}, and the output is float32 [{rows}, {columns}]"
        raise UserError(where, cause, _HINT)
    calls = array.reshape(-1, rows, columns).astype(np.float64)
    rate, peak, values = np.moveaxis(calls, -1, 0)
    if not ((rate >= 0) & (rate <= 1)).all() or (peak < 0).any() or not (np.isfinite(values) & (values > 0)).all():
        cause = "has a rate outside 0 to 1, a negative peak, or a count that is not positive"
        raise UserError(where, cause, _HINT)
    return calls
