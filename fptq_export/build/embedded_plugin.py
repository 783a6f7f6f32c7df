"""The plugin library inside an engine: asked of the builder, and looked for in what it built."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from fptq_export.errors import UserError

__all__ = ["check_embedded", "embed_plugin"]

_OPTION = "--embed-plugin"
_LEAVE_OUT = "leave it out, and load the library beside the engine"


def embed_plugin(trt: Any, config: Any, library: Path) -> None:
    """Have the builder put a plugin library into the engine.

    Args:
        trt: Of `tensorrt_for_target`.
        config: Builder configuration; changed.
        library: The one that the network's plugins are from.

    Raises:
        UserError: This version of the library has no such setting.
    """
    if not hasattr(config, "plugins_to_serialize"):
        cause = f"{trt.__name__} {trt.__version__} does not put plugin libraries into engines"
        raise UserError(_OPTION, cause, _LEAVE_OUT)
    config.plugins_to_serialize = [str(library)]


def check_embedded(trt: Any, engine: Path, library: Path) -> None:
    """Refuse an engine that does not hold the library, byte by byte: the builder drops what it does not take.

    Raises:
        UserError: The engine would not load without the library beside it.
    """
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(library.read_bytes()) < 0:
            cause = f"{trt.__name__} {trt.__version__} built an engine without {library.name} in it"
            raise UserError(_OPTION, cause, _LEAVE_OUT)
