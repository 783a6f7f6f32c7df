from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from safetensors import SafetensorError

from fptq_export.errors import UserError, UserErrors
from fptq_export.files import (
    atomic_path,
    json_path_from_location,
    os_errors_from_safetensors,
    read_json_model,
    remove_partial_files,
    sha256_from_file,
    user_error_from_os_error,
    write_json_model,
    write_text,
)


class Document(BaseModel):
    """A document with a list, to have paths into."""

    name: str
    sizes: list[int] = []


@pytest.fixture(params=[0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The user's umask, one of two."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_file_appears_whole(tmp_path: Path) -> None:
    """Under its final name a file is never seen before it is complete, and its directory is made."""
    target = tmp_path / "new" / "model.onnx"
    with atomic_path(target) as partial:
        partial.write_text("whole")
        assert not target.exists()
        assert partial.parent == target.parent, "the rename is atomic within one directory only"
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_failure_keeps_the_old_file(tmp_path: Path) -> None:
    """If writing fails half-way, the old file stands as it was and nothing else is left."""
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_path(target) as partial:
        partial.write_text("half" * 10_000 + "\ud800", encoding="utf-8")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    """A block that wrote no file does not pass in silence."""
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "model.onnx"):
        pass


def test_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    """Libraries write through private temporary files (0600); the result has the mode of any other file of the user."""
    target = tmp_path / "policy.safetensors"
    with atomic_path(target) as partial:
        partial.touch(mode=0o600)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    assert os.umask(umask) == umask, "the umask itself is put back"


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """What a killed run left goes, files and directories; everything a user may have put there stays."""
    (tmp_path / ".model.onnx.partial").write_text("half")
    (tmp_path / ".checkpoint.partial").mkdir()
    (tmp_path / ".checkpoint.partial" / "model.safetensors").write_text("half")
    keep = [tmp_path / name for name in ("model.onnx", ".hidden", "notes.partial")]
    for path in keep:
        path.write_text("keep")
    remove_partial_files(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(keep)


def test_hash_is_sha256(tmp_path: Path) -> None:
    """The digest of `abc` is the one in FIPS 180-2, and a file longer than one chunk is hashed whole."""
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_from_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"a" * ((1 << 20) + 1))
    longer = sha256_from_file(path)
    path.write_bytes(b"a" * (1 << 20))
    assert sha256_from_file(path) != longer


def test_json_model_survives_the_round_trip(tmp_path: Path) -> None:
    """A document with any text comes back equal."""
    document = Document(name="größe \u2028 \\", sizes=[1, 2])
    write_json_model(document, tmp_path / "d.json")
    assert read_json_model(tmp_path / "d.json", Document) == document


@pytest.mark.parametrize("content", [b"{", b"", b'{"name": "\xff"}'], ids=["truncated", "empty", "no UTF-8"])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file that was cut off names itself and the place."""
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(UserError, match=r"d\.json: not valid JSON"):
        read_json_model(tmp_path / "d.json", Document)


def test_json_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    """A list where an object belongs is one problem at the root."""
    write_text("[]", tmp_path / "d.json")
    with pytest.raises(UserErrors, match=r"1 problem\n.*@ \$"):
        read_json_model(tmp_path / "d.json", Document)


def test_all_problems_are_listed(tmp_path: Path) -> None:
    """Two wrong entries are two lines, each with its path."""
    write_text('{"name": 1, "sizes": [1, "x"]}', tmp_path / "d.json")
    with pytest.raises(UserErrors, match=r"2 problems") as error:
        read_json_model(tmp_path / "d.json", Document)
    assert [problem.path for problem in error.value.problems] == ["$.name", "$.sizes[1]"]


@pytest.mark.parametrize(
    ("location", "path"),
    [
        (("layers", "model.layers.0", "group_size"), '$.layers["model.layers.0"].group_size'),
        (("stages", 2, "name"), "$.stages[2].name"),
        ((), "$"),
    ],
)
def test_json_paths_can_be_followed(location: tuple[str | int, ...], path: str) -> None:
    """Names with dots are quoted, positions are numbers."""
    assert json_path_from_location(location) == path


def test_full_disk_behind_safetensors_is_an_os_error(tmp_path: Path) -> None:
    """A full disk is safetensors' own error there; what is caught elsewhere is OSError."""
    with pytest.raises(OSError, match="No space left") as error, os_errors_from_safetensors(tmp_path / "p"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "p"))


def test_other_safetensors_errors_pass(tmp_path: Path) -> None:
    """A damaged header is no error of the operating system."""
    with pytest.raises(SafetensorError, match="header"), os_errors_from_safetensors(tmp_path / "p"):
        raise SafetensorError("Error while deserializing header")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "permission denied"),
        (errno.ENOTDIR, "a file stands where a directory is needed"),
    ],
)
def test_errors_of_the_system_are_explained(number: int, words: str) -> None:
    """What the user can mend names the file and the way out."""
    error = user_error_from_os_error(OSError(number, os.strerror(number), "/out/model.onnx"))
    assert error is not None
    assert (error.where, error.cause.startswith(words)) == ("/out/model.onnx", True)
    assert error.hint


def test_other_system_errors_stay_what_they_are() -> None:
    """An error nobody can mend by an option keeps its traceback."""
    assert user_error_from_os_error(OSError(errno.EIO, "Input/output error")) is None
