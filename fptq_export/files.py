"""Files that are never half-written: a temporary name beside the target, then a rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from fptq_export.errors import Problem, UserError, UserErrors

__all__ = [
    "PARTIAL_SUFFIX",
    "atomic_path",
    "json_path_from_location",
    "os_errors_from_safetensors",
    "read_json_model",
    "remove_partial_files",
    "sha256_from_file",
    "user_error_from_os_error",
    "write_json_model",
    "write_text",
]

PARTIAL_SUFFIX = ".partial"
_HASH_CHUNK_BYTES = 1 << 20

ModelT = TypeVar("ModelT", bound=BaseModel)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` on success, remove it on failure.

    Args:
        target: Final path; its directory is created.

    Yields:
        The path to write. It lies in the same directory, so that the rename is atomic.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{PARTIAL_SUFFIX}")
    try:
        yield partial
        partial.chmod(_default_mode())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _default_mode() -> int:
    """Mode of a new file under the user's umask; libraries that write through a private temporary file lose it."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def remove_partial_files(directory: Path) -> None:
    """Remove what a killed run left under temporary names in `directory`."""
    for leftover in directory.glob(f".*{PARTIAL_SUFFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 text in one step."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256_from_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json_model(model: BaseModel, path: Path) -> None:
    """Write a pydantic model as indented JSON in one step; equal models give equal bytes."""
    write_text(model.model_dump_json(indent=2) + "\n", path)


def read_json_model(path: Path, model_type: type[ModelT]) -> ModelT:
    """Read a pydantic model from JSON.

    Raises:
        UserError: The file is missing or is not JSON.
        UserErrors: Fields are missing or wrong; every one is listed with its JSON path.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "check the path, or run the stage that writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            str(path), f"not valid JSON ({error})", "restore the file, or delete it to recreate it"
        ) from None
    try:
        return model_type.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = [Problem(json_path_from_location(item["loc"]), item["msg"]) for item in error.errors()]
        raise UserErrors(str(path), problems, "mend every entry listed above and run again") from None


def json_path_from_location(location: tuple[str | int, ...]) -> str:
    """`("layers", "model.layers.0", "group_size")` -> `$.layers["model.layers.0"].group_size`."""
    path = "$"
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}"
        else:
            path += f'["{part}"]'
    return path


@contextmanager
def os_errors_from_safetensors(path: Path) -> Iterator[None]:
    """Raise the operating-system error behind a SafetensorError (a full disk is no OSError there) as an OSError."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def user_error_from_os_error(error: OSError) -> UserError | None:
    """The user's side of an operating-system error, or None when it is not one the user can mend."""
    where = str(error.filename) if error.filename else "output"
    if error.errno == errno.ENOSPC:
        return UserError(where, "the disk is full", "free some space and run the same command again: it resumes")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(where, "permission denied", "choose another output directory with -o")
    if error.errno in (errno.ENOTDIR, errno.EISDIR):
        return UserError(where, "a file stands where a directory is needed, or the reverse", "choose another path")
    return None
