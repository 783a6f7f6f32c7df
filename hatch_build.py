"""Hatchling hook: a wheel carries the C++ sources and what is built from them, and its tag says so.

Without built libraries the wheel is pure (`py3-none-any`). With the plugin libraries, those that
`python -m fptq_export.plugin build` left in `build/plugin` or in FPTQ_PLUGIN_DIR, it is `py3-none-<platform>`; with the
extension of `python -m fptq_export.cpu build` it is tagged for the Python that built it. The platform is that of this
machine (`linux_x86_64`); auditwheel turns it into a manylinux tag.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLUGIN_LIBRARIES = ("libfptq_trt.so", "libfptq_trt_static.so")
SOURCES = ("CMakeLists.txt", "cpu", "include", "src")
"""What of `plugins/` a wheel needs, so that who installs it can build the libraries."""
DIRECTORY_VARIABLE = "FPTQ_PLUGIN_DIR"


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds sources and built libraries to a wheel, and sets its tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is written; an editable install needs none of it."""
        if self.target_name != "wheel" or version == "editable":
            return
        root = Path(self.root)
        plugin = _plugin_libraries(root, self.metadata.version)
        extension = root / "fptq_export" / "cpu" / f"_w4a8_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        for name in SOURCES:
            build_data["force_include"][str(root / "plugins" / name)] = f"fptq_export/plugin/sources/{name}"
        for library in plugin:
            build_data["force_include"][str(library)] = f"fptq_export/plugin/lib/{library.name}"
        operators = extension.with_name("libfptq_ort_ops.so")
        for library in (extension, operators):
            if library.is_file():
                build_data["force_include"][str(library)] = f"fptq_export/cpu/{library.name}"
        if not plugin and not extension.is_file():
            return
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        interpreter = f"{python}-{python}" if extension.is_file() else "py3-none"
        build_data["pure_python"] = False
        build_data["tag"] = f"{interpreter}-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _plugin_libraries(root: Path, version: str) -> list[Path]:
    """Both libraries, or none; raises where one is missing or they are not those of this version."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    directory = Path(given) if given else root / "build" / "plugin"
    libraries = [directory / name for name in PLUGIN_LIBRARIES]
    if not given and not any(library.is_file() for library in libraries):
        return []
    for library in libraries:
        if not library.is_file():
            raise SystemExit(f"{library} is missing: build the plugin (python -m fptq_export.plugin build)")
        function = ctypes.CDLL(str(library)).fptqPluginInfo
        function.restype = ctypes.c_char_p
        info = json.loads(function())
        if info["version"] != version or info["kernels"] != "cuda":
            found = f"version {info['version']} with kernels '{info['kernels']}'"
            raise SystemExit(f"{library} is {found}, not {version} with 'cuda': build the plugin again, or remove it")
    return libraries
