"""`start.sh`: starts the server on a repository, with the plugin where an engine needs it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

__all__ = ["START_SCRIPT", "start_script"]

START_SCRIPT = "start.sh"

_SCRIPT = """\
#!/bin/sh
# Starts Triton Inference Server on the models beside this script. Options of tritonserver may follow:
#   ./start.sh --http-port 9000 --model-control-mode poll
# It runs tritonserver where that is on PATH, as in NVIDIA's container, else the one of the wheel nvidia-pytriton.
set -eu
here="$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)"
if command -v tritonserver >/dev/null 2>&1; then
  set -- tritonserver --model-repository "$here"{options} "$@"
else
  set -- python3 -m fptq_export.triton.wheel_server --model-repository "$here"{options} "$@"
fi
exec "$@"
"""


def start_script(plugins: Sequence[str]) -> str:
    """The script.

    Args:
        plugins: Libraries that engines need, relative to the repository.
    """
    # Triton opens each of them and logs what goes wrong; the engine then fails to load.
    paths = ";".join(f"$here/{plugin}" for plugin in plugins)
    options = f' --backend-config="tensorrt,plugins={paths}"' if plugins else ""
    if any(shlex.quote(plugin) != plugin for plugin in plugins):
        raise AssertionError("names of models and libraries need no quotes")
    return _SCRIPT.replace("{options}", options)
