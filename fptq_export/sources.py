"""Where the C++ sources of the plugin and of the CPU path are, and where they are built.

A checkout has them in `plugins/` and builds in `build/`. A wheel carries a copy inside the package, which may be
read-only, so it builds in the user's cache.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["build_root", "source_root"]

_PACKAGE = Path(__file__).resolve().parent
_PACKAGED = _PACKAGE / "plugin" / "sources"
_CACHE_VARIABLE = "XDG_CACHE_HOME"


def source_root(package: Path = _PACKAGE) -> Path:
    """Folder of the CMakeLists.txt of the plugin: the wheel's copy where there is one, else that of a checkout."""
    packaged = package / _PACKAGED.relative_to(_PACKAGE)
    return packaged if packaged.is_dir() else package.parent / "plugins"


def build_root(package: Path = _PACKAGE) -> Path:
    """Folder that builds may write to; made by whoever builds."""
    if source_root(package).parent == package.parent:
        return package.parent / "build"
    cache = os.environ.get(_CACHE_VARIABLE)
    return (Path(cache) if cache else Path.home() / ".cache") / "fptq-export"
