"""Files of collected range outputs: each format gives the same calls, and anything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.monitor.totals import RangeTotals
from fptq_export.monitor.values import calls_from_file

ROWS = 2
CALLS = np.array(
    [[[0.25, 1.5, 64], [0.0, 0.5, 128]], [[0.0, 0.75, 16], [0.5, 2.0, 32]], [[1.0, 3.0, 8], [0.0, 0.25, 16]]],
    np.float32,
)


def read(path: Path) -> NDArray[np.float64]:
    """Every call of a file."""
    return np.concatenate(list(calls_from_file(path, ROWS)))


def test_every_format_gives_the_same_calls(tmp_path: Path) -> None:
    """Stacked, one array a call, beside other arrays, as lists and as objects: all of them, in order."""
    np.save(tmp_path / "stacked.npy", CALLS)
    np.savez(tmp_path / "each.npz", *CALLS)
    np.savez(tmp_path / "named.npz", range_monitor=CALLS, logits=np.zeros((1, 4, 8)))
    lists = "\n".join(json.dumps(call.tolist()) for call in CALLS)
    (tmp_path / "lists.jsonl").write_text(lists + "\n\n")
    objects = "\n".join(json.dumps({"time": 1, "range_monitor": call.tolist()}) for call in CALLS)
    (tmp_path / "objects.jsonl").write_text(objects)
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(read(path), CALLS, err_msg=path.name)


def _npz(path: Path, **arrays: NDArray[Any]) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # the stub has a bool keyword
    return path


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _changed(row: int, column: int, number: float) -> NDArray[np.float32]:
    array = CALLS.copy()
    array[1, row, column] = number
    return array


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", np.zeros((3, 3), np.float32), r"array 'arr'.*float32 \[3, 3\].*float32 \[2, 3\]"),
        ("a.npz", np.zeros((1, 1, 2, 3), np.float32), r"float32 \[1, 1, 2, 3\]"),
        ("a.npz", np.ones((2, 3), np.int64), "is int64"),
        ("a.npz", np.array([[None] * 3] * 2), "cannot be read"),
        ("a.npz", _changed(0, 0, 1.5), "rate outside 0 to 1"),
        ("a.npz", _changed(0, 0, np.nan), "rate outside 0 to 1"),
        ("a.npz", _changed(1, 1, -1.0), "negative peak"),
        ("a.npz", _changed(1, 2, 0.0), "count that is not positive"),
        ("a.npz", "no archive", "cannot be read"),
        ("a.npy", "", "cannot be read"),
        ("a.jsonl", "[[0.0, 0.5, 1], [0.0, 0.5, 1]]\n{}", "line 2"),
        ("a.jsonl", "[[0.0, 0.5, 1], [0.0, 0.5]]", "line 1"),
        ("a.jsonl", "3", r"line 1: is float64 \[\]"),
        ("a.csv", "0,1,2", "known format"),
        ("missing.npz", None, "no such file"),
    ],
)
def test_anything_else_is_refused_with_its_place(tmp_path: Path, name: str, content: Any, message: str) -> None:
    """Another graph's output, a pickle, a broken file: the array or the line is named, nothing is guessed."""
    path = tmp_path / name
    if isinstance(content, str):
        _text(path, content)
    elif content is not None:
        _npz(path, arr=content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_calls_are_pooled_by_their_values() -> None:
    """A prompt of many tokens weighs more than a decode step, however the calls are cut into files."""
    calls = CALLS.astype(np.float64)
    whole = RangeTotals.none(ROWS).with_calls(calls)
    parts = RangeTotals.none(ROWS).with_calls(calls[:1]).with_calls(calls[1:])
    for totals in (whole, parts):
        assert totals.calls == 3
        np.testing.assert_array_equal(totals.saturation_rate, [(16 + 0 + 8) / 88, 16 / 176])
        np.testing.assert_array_equal(totals.worst_rate, [1.0, 0.5])
        np.testing.assert_array_equal(totals.peak, [3.0, 2.0])


def test_a_peak_that_is_no_number_stays_the_largest() -> None:
    """NaN is not lost in a maximum."""
    totals = RangeTotals.none(ROWS).with_calls(_changed(0, 1, np.nan).astype(np.float64))
    np.testing.assert_array_equal(totals.peak, [np.inf, 2.0])
