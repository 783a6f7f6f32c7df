"""Engines from files, and what TensorRT says where it gives none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fptq_export.errors import UserError

__all__ = ["deserialized_engine", "load_plugins", "logger_into"]

_NAMESPACE = "fptq"
"""Of the creators that our plugin library brings."""
_ERROR = 1
"""Of TensorRT's severities 0 to 4, the last that is an error."""


def logger_into(trt: Any, errors: list[str]) -> Any:
    """A logger that appends what is an error to a list, and drops the rest. It must outlive what it is given to.

    Args:
        trt: Of `tensorrt_for_target`.
        errors: Grows.
    """

    class ErrorLog(trt.ILogger):  # type: ignore[misc] # the library has no types
        """Keeps what is an error."""

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= _ERROR:
                errors.append(message)

    return ErrorLog()


def load_plugins(trt: Any, library: Path) -> None:
    """Have TensorRT load a plugin library, once a process. Raises UserError when it brings no plugin.

    The handle says nothing (TensorRT for RTX 1.7.1 returns an empty one on success), so the creators are looked at.
    """
    registry = trt.get_plugin_registry()
    if _has_plugins(registry):
        return
    registry.load_library(str(library))
    if not _has_plugins(registry):
        cause = f"{trt.__name__} {trt.__version__} cannot load this plugin library"
        raise UserError(str(library), cause, "build it again: python -m fptq_export.plugin build")


def deserialized_engine(
    trt: Any, runtime: Any, engine: Path, plugin: Path | None, *, host_code: bool = False
) -> Any | None:
    """The engine in a file; None where TensorRT refuses it: the runtime's logger then has the reasons.

    Args:
        trt: Of `tensorrt_for_target`.
        runtime: Made with a logger; must outlive the engine.
        engine: The file.
        plugin: Library of the plugins it needs.
        host_code: Whether TensorRT may run code that the file brings: an engine that carries its plugin does. Such a
            file must be one that is trusted, like a program.

    Raises:
        UserError: The plugin library brings no plugin.
    """
    if plugin is not None:
        load_plugins(trt, plugin)
    runtime.engine_host_code_allowed = host_code
    return runtime.deserialize_cuda_engine(engine.read_bytes())


def _has_plugins(registry: Any) -> bool:
    return any(creator.plugin_namespace == _NAMESPACE for creator in registry.all_creators)
