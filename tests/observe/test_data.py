"""Input data is checked whole before a run: names, types, shapes, values; files are cut into batches as documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError, UserErrors
from fptq_export.observe.data import GraphInput, data_from_path

FLOAT = np.dtype(np.float32)
IMAGE = GraphInput("image", FLOAT, ("batch", 3, 8, 8))
TIME = GraphInput("time", np.dtype(np.int64), ("batch",))
FIXED = GraphInput("image", FLOAT, (2, 3))


def image(batch: int = 2, *shape: int) -> NDArray[np.float32]:
    """Zeros as `IMAGE` takes them."""
    return np.zeros((batch, *(shape or (3, 8, 8))), np.float32)


def times(batch: int = 2) -> NDArray[np.int64]:
    """As `TIME` takes them."""
    return np.arange(batch)


def saved(directory: Path, name: str = "data.npz", **arrays: NDArray[Any]) -> Path:
    """Write a .npz file."""
    np.savez(directory / name, allow_pickle=False, **arrays)
    return directory / name


def test_file_is_one_batch(tmp_path: Path) -> None:
    """Whatever its first dimension is, where the graph leaves that open."""
    data = data_from_path(saved(tmp_path, image=image(5), time=times(5)), "--calib-data", (IMAGE, TIME))
    (batch,) = data.batches()
    assert data.count == 1
    assert {name: array.shape for name, array in batch.items()} == {"image": (5, 3, 8, 8), "time": (5,)}


def test_batch_size_cuts_a_file(tmp_path: Path) -> None:
    """In order, and the last batch holds what is left."""
    data = data_from_path(saved(tmp_path, image=image(5), time=times(5)), "--calib-data", (IMAGE, TIME), 2)
    batches = list(data.batches())
    assert data.count == len(batches) == 3
    assert [batch["time"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [len(batch["image"]) for batch in batches] == [2, 2, 1]


def test_batch_that_the_graph_fixes_cuts_a_file(tmp_path: Path) -> None:
    """Samples along the first axis of a graph of fixed batch."""
    data = data_from_path(
        saved(tmp_path, image=np.arange(12, dtype=np.float32).reshape(4, 3)), "--calib-data", (FIXED,)
    )
    assert [batch["image"][0, 0] for batch in data.batches()] == [0.0, 6.0]


def test_samples_that_do_not_fill_the_last_batch_are_refused(tmp_path: Path) -> None:
    """A graph of batch 2 cannot run on one sample."""
    path = saved(tmp_path, image=np.zeros((5, 3), np.float32))
    with pytest.raises(UserErrors, match=r"dimension 0 is 5, the graph takes 2 at a time @ .*data\.npz: image"):
        data_from_path(path, "--calib-data", (FIXED,))


def test_batch_size_that_the_graph_does_not_take_is_refused(tmp_path: Path) -> None:
    """It is not ignored."""
    path = saved(tmp_path, image=np.zeros((4, 3), np.float32))
    with pytest.raises(UserError, match="--batch-size 4: the graph fixes its batch to 2"):
        data_from_path(path, "--calib-data", (FIXED,), 4)


def test_directory_is_a_batch_a_file(tmp_path: Path) -> None:
    """In the order of names; other files are not read."""
    (tmp_path / "notes.txt").write_text("mine")
    for name, value in (("b.npy", 2.0), ("a.npy", 1.0)):
        np.save(tmp_path / name, np.full((2, 3), value, np.float32))
    data = data_from_path(tmp_path, "--calib-data", (FIXED,))
    assert [batch["image"][0, 0] for batch in data.batches()] == [1.0, 2.0]


def test_every_failure_is_listed_with_its_place(tmp_path: Path) -> None:
    """Unknown and missing names, types, ranks, fixed and tied sizes, NaN, and a file that cannot be read."""
    wrong = image(2, 3, 8, 9)
    saved(tmp_path, "a.npz", image=wrong, mask=times())
    saved(tmp_path, "b.npz", image=image().astype(np.float64), time=times()[:, None])
    saved(tmp_path, "c.npz", image=np.full_like(image(), np.nan), time=times())
    saved(tmp_path, "d.npz", image=image(3), time=times())
    (tmp_path / "e.npz").write_bytes(b"PK not a zip")
    with pytest.raises(UserErrors) as caught:
        data_from_path(tmp_path, "--calib-data", (IMAGE, TIME))
    found = [(Path(problem.path.partition(":")[0]).name, problem.message) for problem in caught.value.problems]
    assert [(name, message.partition(":")[0]) for name, message in found[:-1]] == [
        ("a.npz", "the graph has no such input"),
        ("a.npz", "dimension 3 is 9, the graph fixes it to 8"),
        ("a.npz", "is missing"),
        ("b.npz", "is float64, not float32"),
        ("b.npz", "has shape [2, 1], not 1 dimensions"),
        ("c.npz", "has NaN or infinite values"),
        ("d.npz", "dimension 0, 'batch', is 2 here and 3 in 'image'"),
    ]
    assert found[-1][0] == "e.npz"
    assert "not a readable NumPy file" in found[-1][1]
    assert "the graph takes image: float32 [batch, 3, 8, 8], time: int64 [batch]" in str(caught.value)


def test_arrays_that_would_run_code_are_refused(tmp_path: Path) -> None:
    """An object array is a pickle."""
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserErrors, match="not a readable NumPy file"):
        data_from_path(tmp_path / "x.npy", "--calib-data", (FIXED,))


def test_single_array_does_for_one_input_only(tmp_path: Path) -> None:
    """Nobody can say which of two inputs a .npy file is."""
    np.save(tmp_path / "x.npy", image())
    with pytest.raises(UserErrors, match=r"a \.npy file has one array, and the graph takes 2"):
        data_from_path(tmp_path / "x.npy", "--calib-data", (IMAGE, TIME))


@pytest.mark.parametrize(
    ("name", "cause"),
    [("none", "no such file or directory"), ("model.txt", "neither a .npz nor a .npy file"), ("", "holds no .npz")],
)
def test_path_that_is_no_data_is_refused(name: str, cause: str, tmp_path: Path) -> None:
    """With the option and the path."""
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(UserError, match="--calib-data .*" + cause):
        data_from_path(tmp_path / name, "--calib-data", (FIXED,))
