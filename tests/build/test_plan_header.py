"""What the first bytes of a file tell about an engine, and about what is taken for one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fptq_export.build.plan_header import header_from_file, what_instead


def rtx_engine(size: int = 64) -> bytes:
    """The header of TensorRT for RTX 1.7.1.116, then zeros."""
    start = b"vtrt" + bytes(12) + struct.pack("<Q", size) + bytes((1, 7, 1, 116)) + b"tvtr"
    return start + bytes(size - len(start))


def test_header_says_version_and_size(tmp_path: Path) -> None:
    """Both are read from where the library writes them, and such a file is an engine."""
    path = tmp_path / "out.plan"
    path.write_bytes(rtx_engine())
    header = header_from_file(path)
    assert header is not None
    assert (header.library_version, header.file_bytes) == ("1.7.1.116", 64)
    assert what_instead(path) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b'{"a": "a JSON text that is long enough"}', "JSON"),
        (bytes(64), "zeros"),
        (b"vtrt", "only 4 bytes"),
        (b"\x89PNG" + bytes(64), "no kind that TensorRT writes"),
    ],
)
def test_what_is_no_engine_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    """The usual mistakes are told apart, so that the person knows what to mend."""
    path = tmp_path / "out.plan"
    path.write_bytes(content)
    assert header_from_file(path) is None
    assert words in str(what_instead(path))


def test_unknown_header_of_tensorrt_is_not_called_broken(tmp_path: Path) -> None:
    """Only one header is known: about others nothing is claimed."""
    path = tmp_path / "out.plan"
    path.write_bytes(b"ftrt" + bytes(64))
    assert header_from_file(path) is None
    assert what_instead(path) is None
