"""The first bytes of an engine file, as far as they are certain.

TensorRT for RTX (seen in 1.7.1): bytes 0-3 are `vtrt`; bytes 16-23 the size of the whole file, little-endian, which the
runtime compares with what it is given; bytes 24-27 the version of the library: major, minor, patch, build. Nothing is
said about other headers, but what else a file is can often be told.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HEADER_BYTES", "PlanHeader", "header_from_file", "what_instead"]

HEADER_BYTES = 32
_RTX = b"vtrt"
_SIZE = struct.Struct("<Q")
_SIZE_AT, _VERSION_AT = 16, 24
_ANY_TENSORRT = b"trt"
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
    b"PK\x03\x04": "a ZIP archive",
    b"{": "JSON text",
    b"<": "HTML or XML text",
    b"\x7fELF": "a shared library or program",
    b"\x00\x00\x00\x00": "filled with zeros, as after an aborted copy",
}
"""First bytes of what is taken for an engine by mistake."""


@dataclass(frozen=True)
class PlanHeader:
    """What the header of a TensorRT for RTX engine says."""

    library_version: str
    file_bytes: int


def header_from_file(path: Path) -> PlanHeader | None:
    """The header, or None where it is not that of a TensorRT for RTX engine."""
    start = _start(path)
    if not start.startswith(_RTX) or len(start) < HEADER_BYTES:
        return None
    (size,) = _SIZE.unpack_from(start, _SIZE_AT)
    return PlanHeader(".".join(str(byte) for byte in start[_VERSION_AT : _VERSION_AT + 4]), size)


def what_instead(path: Path) -> str | None:
    """What a file is that is no engine, in words; None where it may be one of a library whose header is not known."""
    start = _start(path)
    if not start:
        return "empty"
    for magic, words in _OTHERS.items():
        if start.startswith(magic):
            return words
    if path.suffix == ".onnx":
        return "an ONNX graph, from which an engine is yet to be built"
    if len(start) < HEADER_BYTES:
        return f"only {len(start)} bytes long"
    return None if _ANY_TENSORRT in start[:8] else "of no kind that TensorRT writes"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)
