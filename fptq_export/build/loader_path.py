"""Where the dynamic loader must look so that TensorRT for RTX can load plugins."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fptq_export.build.targets import Target
from fptq_export.errors import UserError

__all__ = ["loader_environment"]

_RTX_PACKAGE = "tensorrt_rtx_libs"
_RTX_LIBRARY = "libtensorrt_rtx.so"
_VARIABLE = "LD_LIBRARY_PATH"


@contextmanager
def loader_environment(target: Target) -> Iterator[dict[str, str]]:
    """Environment variables for a process that loads plugins, as long as the context is open.

    The ONNX parser of TensorRT for RTX 1.7.1 loads `libtensorrt_rtx.so` by that name to reach the plugin registry and
    ends the process where it is not found; the wheel carries `libtensorrt_rtx.so.1` only. So a link of that name is put
    on the loader's path.

    Raises:
        UserError: The wheel's library is not where it should be.
    """
    if target is not Target.TENSORRT_RTX:
        yield {}
        return
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / _RTX_LIBRARY).symlink_to(_rtx_library())
        search = [directory, os.environ.get(_VARIABLE, "")]
        yield {_VARIABLE: os.pathsep.join(part for part in search if part)}


def _rtx_library() -> Path:
    spec = importlib.util.find_spec(_RTX_PACKAGE)
    for place in (spec.submodule_search_locations if spec is not None else None) or []:
        found = sorted(Path(place).glob(f"{_RTX_LIBRARY}.*"))
        if found:
            return found[0]
    cause = f"the package {_RTX_PACKAGE} has no {_RTX_LIBRARY}, so plugins cannot be loaded"
    raise UserError("--plugin on", cause, 'pip install "fptq-export[rtx]"')
