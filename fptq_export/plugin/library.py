"""Where the built libraries are, and what they say about themselves."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fptq_export.errors import UserError
from fptq_export.sources import build_root, source_root

__all__ = [
    "BUILD_DIR",
    "DIRECTORY_VARIABLE",
    "LOADED_LIBRARY",
    "REGISTERING_LIBRARY",
    "SOURCE_DIR",
    "PluginInfo",
    "library_for_loading",
    "library_that_registers",
    "plugin_info",
]

LOADED_LIBRARY = "libfptq_trt.so"
REGISTERING_LIBRARY = "libfptq_trt_static.so"
DIRECTORY_VARIABLE = "FPTQ_PLUGIN_DIR"
"""Directory of the libraries; wins over every other place."""
SOURCE_DIR = source_root()
"""C++ sources: those of a checkout, or the copy that a wheel carries."""
BUILD_DIR = build_root() / "plugin"
"""Where `python -m fptq_export.plugin build` builds: in a checkout, or in the user's cache."""
_PACKAGED_DIR = Path(__file__).resolve().parent / "lib"
"""Where a wheel that carries the libraries has them."""


class PluginInfo(BaseModel):
    """What a plugin library was built from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    library: Path
    version: str
    """Version of fptq-export."""
    layout_version: int
    """Layout of packed weights it reads; that of `packing.LAYOUT_VERSION` where both fit together."""
    kernels: Literal["cuda", "double"]
    """`double`: a stand-in for tests that computes nothing."""
    architectures: tuple[int, ...]
    """Compute capabilities (86 is 8.6) with machine code; the newest also has PTX for later ones."""
    tensorrt_headers: str
    """Version of the TensorRT headers, e.g. `10.14`."""


def library_for_loading() -> Path:
    """`libfptq_trt.so`, for `IPluginRegistry.load_library`, `plugins_to_serialize` and trtexec `--dynamicPlugins`.

    Raises:
        UserError: It is not built.
    """
    return _library(LOADED_LIBRARY)


def library_that_registers() -> Path:
    """`libfptq_trt_static.so`, for Polygraphy `--plugins`, Triton `plugins=`, LD_PRELOAD, trtexec `--staticPlugins`.

    Raises:
        UserError: It is not built.
    """
    return _library(REGISTERING_LIBRARY)


def plugin_info(library: Path | None = None) -> PluginInfo:
    """What a library was built from; by default the one that `library_for_loading` finds.

    Raises:
        UserError: It is not built, or it is not a library of ours.
    """
    path = library_for_loading() if library is None else library
    try:
        function = ctypes.CDLL(str(path)).fptqPluginInfo
    except (OSError, AttributeError) as error:
        hint = "build it again: python -m fptq_export.plugin build"
        raise UserError(str(path), f"is not a plugin library of fptq-export ({error})", hint) from error
    function.restype = ctypes.c_char_p
    text: bytes = function()
    fields = {"library": path, **_fields(text)}
    return PluginInfo.model_validate(fields)


def _fields(text: bytes) -> dict[str, object]:
    fields: dict[str, object] = json.loads(text)
    fields["architectures"] = tuple(int(word) for word in str(fields["architectures"]).split())
    return fields


def _library(name: str) -> Path:
    wanted = os.environ.get(DIRECTORY_VARIABLE)
    places = [Path(wanted)] if wanted else [_PACKAGED_DIR, BUILD_DIR]
    for place in places:
        if (place / name).is_file():
            return (place / name).resolve()
    looked = " and ".join(str(place) for place in places)
    hint = "build it: python -m fptq_export.plugin build"
    raise UserError(name, f"the plugin library is not in {looked}", hint)
