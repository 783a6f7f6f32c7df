"""Text from files and data sets: a source name becomes a stream of documents."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fptq_export.errors import UserError

__all__ = ["SOURCES_HINT", "documents_from_source", "is_text_file", "needs_tokenizer"]

SOURCES_HINT = (
    "choose builtin, random, a .txt, .jsonl, .fasta or .npz file, or the id of a data set"
    " (needs `pip install datasets`)"
)
_FASTA = (".fasta", ".fa", ".faa")
_TEXT_FIELDS = ("text", "content", "prompt")
_DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w.-]+)?", re.ASCII)
_SHUFFLE_BUFFER = 10_000
"""Documents that a streamed data set is shuffled within."""


def is_text_file(source: str) -> bool:
    """Whether a source is a file by its name: such a source has an end."""
    return Path(source).suffix in (".txt", ".jsonl", *_FASTA)


def needs_tokenizer(source: str) -> bool:
    """Whether a source is text: not token ids, nor random ones."""
    return source != "random" and Path(source).suffix != ".npz"


def documents_from_source(source: str, seed: int) -> Iterator[str]:
    """Stream the documents of a `.txt`, `.jsonl` or `.fasta` file, or of a data set on the hub.

    Args:
        source: A path, or `id[:config][@split]` of a data set; the split is `train` if none is given.
        seed: Order of a data set's documents. Files are read in order.

    Raises:
        UserError: There is no such source, or a record of it cannot be read.
    """
    path = Path(source)
    if path.suffix == ".txt":
        return iter([_read_text(path)])
    if path.suffix == ".jsonl":
        return _documents_from_jsonl(path)
    if path.suffix in _FASTA:
        return _sequences_from_fasta(path)
    if path.exists() or not _DATASET_ID.fullmatch(source):
        raise UserError(source, "not a source of text", SOURCES_HINT)
    return _documents_from_dataset(source, seed)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "no such file", SOURCES_HINT) from None
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"not UTF-8 text ({error})", "save it as UTF-8") from None


def _documents_from_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}", f"not JSON ({error})", "each line must be one JSON object") from None
        yield _text_of_record(record, f"{path}:{number}")


def _sequences_from_fasta(path: Path) -> Iterator[str]:
    """Sequences, each below a line that starts with `>`, without their line breaks."""
    records = re.split(r"^>.*$", _read_text(path), flags=re.MULTILINE)
    if records[0].strip() or len(records) == 1:
        raise UserError(str(path), "not FASTA: a sequence comes before the first line with >", "add that line")
    for record in records[1:]:
        sequence = "".join(record.split())
        if sequence:
            yield sequence


def _text_of_record(record: object, where: str) -> str:
    """The text of a record: field `text`, else `content`, else `prompt`."""
    fields = record if isinstance(record, Mapping) else {}
    for field in _TEXT_FIELDS:
        value = fields.get(field)
        if isinstance(value, str):
            return value
    found = ", ".join(map(str, fields)) or type(record).__name__
    raise UserError(where, f"no text in it (found: {found})", f"put the text in a field {' or '.join(_TEXT_FIELDS)}")


def _documents_from_dataset(source: str, seed: int) -> Iterator[str]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise UserError(source, "no such file; a data set needs the library datasets", SOURCES_HINT) from None
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        # Not found, not reachable, no such split: datasets derives all of them from these three.
        raise UserError(source, f"the data set cannot be opened ({error})", SOURCES_HINT) from error
    for row in rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER):
        yield _text_of_record(row, f"data set {source}")
