"""The C++ part of `fptq_export.cpu`, built once a session, as a user builds it."""

from __future__ import annotations

import functools

import pytest

from fptq_export.cpu.build import build_extension, missing_tools

__all__ = ["built_cpu_kernels"]


@functools.cache
def _build() -> None:
    build_extension()


def built_cpu_kernels() -> None:
    """Build what changed; skip where this machine cannot compile."""
    if missing := missing_tools():
        pytest.skip(f"cannot build fptq_export.cpu; missing: {', '.join(missing)}")
    _build()
