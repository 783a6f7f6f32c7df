"""The server that the wheel `nvidia-pytriton` carries, for machines without NVIDIA's container.

    python -m fptq_export.triton.wheel_server --model-repository REPO ...

takes the options of `tritonserver`. The wheel has the server, its Python backend, and one `triton_python_backend_stub`
for each Python; this module lays them out as the server looks for them.

The Python backend runs models in an interpreter that it embeds, which reads no PYTHONPATH and takes `python3` on PATH
for its own. It gets an environment of its own there, whose modules are those of this process.

The wheel's Python backend (Triton 24.10) is built with a pybind11 from before NumPy 2, and reads the size of an element
from where NumPy 1 had it: every tensor arrives as repetitions of its first byte
(triton-inference-server/python_backend#384, mended in 24.11). So NumPy 1 has to lie in a folder, which goes before the
NumPy of this process: `pip install --no-deps --target DIR "numpy<2"`, DIR as `numpy_directory` says.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fptq_export.errors import UserError

__all__ = ["NUMPY_VARIABLE", "WheelServer", "main", "numpy_directory", "wheel_server"]

NUMPY_VARIABLE = "FPTQ_TRITON_NUMPY"
"""Folder with NumPy 1; wins over the one in this environment."""
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class WheelServer:
    """How to start it."""

    command: tuple[str, ...]
    """Options of `tritonserver` go behind."""
    environment: Mapping[str, str]


def numpy_directory() -> Path:
    """Where NumPy 1 is looked for."""
    named = os.environ.get(NUMPY_VARIABLE)
    return Path(named) if named else Path(sys.prefix) / "share" / "fptq-export" / "numpy1"


def wheel_server(directory: Path) -> WheelServer:
    """Lay the server out in an empty directory, which must stay as long as it runs.

    Raises:
        UserError: The wheel is not installed, has no stub for this Python, or NumPy 1 is missing.
    """
    root = _wheel_root()
    stub = root / "tritonserver" / "python_backend_stubs" / _python_version() / _STUB
    if not stub.is_file():
        raise UserError("nvidia-pytriton", f"has no stub for Python {_python_version()}", "use Python 3.11 or 3.12")
    backends = directory / "backends"
    shutil.copytree(
        root / "tritonserver" / "backends" / "python", backends / "python", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy2(stub, backends / "python")
    python = _stub_environment(directory / "python")
    libraries = [str(root.parent / "nvidia_pytriton.libs"), *_python_libraries()]
    return WheelServer(
        command=(str(root / "tritonserver" / "bin" / "tritonserver"), "--backend-directory", str(backends)),
        environment={
            **os.environ,
            "PATH": os.pathsep.join([str(python / "bin"), os.environ.get("PATH", os.defpath)]),
            "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *_given("LD_LIBRARY_PATH")]),
        },
    )


def main(arguments: list[str]) -> int:
    """Run the server until it ends; its exit code."""
    import signal
    import subprocess

    with tempfile.TemporaryDirectory(prefix="tritonserver-") as scratch:
        server = wheel_server(Path(scratch))
        process = subprocess.Popen([*server.command, *arguments], env=dict(server.environment))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _frame: process.send_signal(received))
        return process.wait()


def _wheel_root() -> Path:
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        hint = "pip install --no-deps nvidia-pytriton, or run start.sh in NVIDIA's Triton container"
        raise UserError("tritonserver", "is neither on PATH nor in the wheel nvidia-pytriton", hint)
    return Path(spec.origin).parent


def _stub_environment(directory: Path) -> Path:
    """An environment whose modules are those of this process, behind NumPy 1."""
    numpy = numpy_directory()
    if not (numpy / "numpy").is_dir():
        hint = f'pip install --no-deps --target "{numpy}" "numpy<2" (there is none for Python 3.13)'
        raise UserError("tritonserver", f"the one in nvidia-pytriton needs NumPy 1, and {numpy} has none", hint)
    venv.EnvBuilder(with_pip=False, symlinks=True).create(directory)
    modules = [str(numpy), *(entry for entry in sys.path if Path(entry).is_dir() and "site-packages" not in entry)]
    sites = [entry for entry in sys.path if "site-packages" in entry]
    # A line with `import` is run: the packages of this environment come with what their own .pth files add.
    lines = [*modules, *(f"import site; site.addsitedir({entry!r})" for entry in sites)]
    site = directory / "lib" / f"python{_python_version()}" / "site-packages" / "fptq-export.pth"
    site.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _python_libraries() -> list[str]:
    """Where libpython of this interpreter lies; the stub links to it."""
    directory = sysconfig.get_config_var("LIBDIR")
    return [directory] if directory else []


def _given(variable: str) -> list[str]:
    return [value] if (value := os.environ.get(variable)) else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
