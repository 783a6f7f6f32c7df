"""Sizes of attention over a cache in place, which graphs and callers keep to: those of plugins/cpu/attention_cpu.h."""

from __future__ import annotations

__all__ = ["KEY_PANEL", "MAX_HEAD_SIZE"]

KEY_PANEL = 16
"""Tokens of keys that lie side by side. Channels of a head and slots of a cache are multiples of it."""
MAX_HEAD_SIZE = 256
"""Channels of a head."""
