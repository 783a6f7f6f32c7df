"""How much text a model takes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """How much text a model takes; None where nothing says so."""

    max_input_len: int | None = None
    """Tokens of a prompt."""
    max_kv_len: int | None = None
    """Tokens of prompt and answer."""
    max_batch_size: int | None = None
