"""Which files of a checkpoint directory belong to its tokenizer."""

from __future__ import annotations

from pathlib import Path

__all__ = ["tokenizer_files"]

_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """The tokenizer's files, in order of name; weights are never among them."""
    found = {path for pattern in _TOKENIZER_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return tuple(sorted(path for path in found if path.suffix != ".safetensors"))
