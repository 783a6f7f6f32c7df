"""`start.sh`: starts the server on a repository, with the plugin where an engine needs it or brings it."""

from __future__ import annotations

import shlex
from pathlib import PurePath

from fptq_export.triton.serving.routing import ROUTE_HEADER

__all__ = ["START_SCRIPT", "start_script"]

START_SCRIPT = "start.sh"

_SCRIPT = """\
#!/bin/sh
# Starts Triton Inference Server on the models beside this script. Options of tritonserver may follow:
#   ./start.sh --http-port 9000 --model-control-mode poll
# It runs tritonserver where that is on PATH, as in NVIDIA's container, else the one of the wheel nvidia-pytriton.
set -eu
# A router takes the model that the gRPC metadata {header} names.
set -- --grpc-header-forward-pattern={header} "$@"
here="$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)"
if command -v tritonserver >/dev/null 2>&1; then
  set -- tritonserver --model-repository "$here"{options} "$@"
else
  set -- python3 -m fptq_export.triton.wheel_server --model-repository "$here"{options} "$@"
fi
exec "$@"
"""


def start_script(plugin: PurePath | None, *, host_code: bool = False) -> str:
    """The script.

    Args:
        plugin: The library that engines need, relative to the repository; None where none needs it.
        host_code: Whether an engine carries its plugin, whose code the server must then be allowed to run.
    """
    options = ""
    if plugin is not None:
        if shlex.quote(str(plugin)) != str(plugin):
            raise AssertionError("names of models and libraries need no quotes")
        # Triton opens the library and logs what goes wrong; the engine then fails to load.
        options += f' --backend-config="tensorrt,plugins=$here/{plugin}"'
    if host_code:
        # The backend's only way to `IRuntime::setEngineHostCodeAllowed(true)`; it holds for every engine of the server.
        options += " --backend-config=tensorrt,version-compatible=true"
    return _SCRIPT.replace("{header}", ROUTE_HEADER).replace("{options}", options)
