"""What a run took place on, for the manifest and for the keys of stages whose result depends on a library."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from importlib.metadata import packages_distributions, version

__all__ = ["environment", "library_versions"]

_LIBRARIES = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx")


def environment() -> dict[str, str]:
    """Python, platform and libraries with their versions."""
    return {"python": platform.python_version(), "platform": platform.platform(), **library_versions()}


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Versions of the libraries that take part, by module (the distribution is called `tensorrt-rtx-cu13`).

    Once a process: to find a module's distribution, the files of all that are installed are read.
    """
    distributions = packages_distributions()
    return {name: version(distributions[name][0]) for name in _LIBRARIES if name in distributions}
