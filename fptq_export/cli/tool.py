"""Verbs beside the road: each reads a model, a run directory or an engine, and tells something about it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fptq_export.errors import ExitCode

__all__ = ["Tool"]


@dataclass(frozen=True)
class Tool:
    """One verb: its options, and what runs it."""

    verb: str
    help: str
    examples: str
    """The end of its help."""
    add_options: Callable[[argparse.ArgumentParser], None]
    """Adds the options. Only those that are given appear in the namespace."""
    run: Callable[[Mapping[str, Any], str, Console], ExitCode]
    """Takes the options that were given, the command line, and the console for notes and progress. Results go to
    stdout. It imports what is heavy (torch, ONNX Runtime, TensorRT) itself, because help does without."""
