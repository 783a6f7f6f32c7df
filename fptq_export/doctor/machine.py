"""What this machine has: GPUs, TensorRT, the plugin, ONNX Runtime."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from fptq_export.build.gpus import Driver, driver_of_machine
from fptq_export.build.open_engine import Opened, open_engine
from fptq_export.build.targets import Target, is_installed
from fptq_export.doctor.report import Check
from fptq_export.errors import UserError
from fptq_export.packing import LAYOUT_VERSION
from fptq_export.plugin import PluginInfo, plugin_info

__all__ = ["Machine", "checks_of_machine", "machine_of_here", "rows_from_machine"]

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "polygraphy", "numpy")
_ENGINES = (Target.TENSORRT, Target.TENSORRT_RTX)


@dataclass(frozen=True)
class Machine:
    """What was found."""

    driver: Driver
    tensorrt: Mapping[Target, Opened]
    """The flavours that are installed, and what came of importing them."""
    plugin: PluginInfo | None
    plugin_error: UserError | None = None
    """Why there is no plugin."""
    providers: tuple[str, ...] = ()
    """Execution providers of ONNX Runtime."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of the libraries, by name."""


def machine_of_here() -> Machine:
    """Look at this machine."""
    import onnxruntime

    plugin, error = _plugin()
    return Machine(
        driver=driver_of_machine(),
        tensorrt={target: open_engine(target) for target in _ENGINES if is_installed(target)},
        plugin=plugin,
        plugin_error=error,
        providers=tuple(onnxruntime.get_available_providers()),
        libraries={"python": platform.python_version(), **dict(_versions())},
    )


def rows_from_machine(machine: Machine) -> dict[str, str]:
    """The table: what -> value."""
    driver = machine.driver
    gpus = [f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in driver.gpus]
    plugin = machine.plugin
    rows = {
        "machine": platform.platform(),
        "NVIDIA driver": driver.nvidia_version or ("installed" if driver.cuda_version else "none"),
        "CUDA the driver runs": driver.cuda_version or "none",
        "GPUs": ", ".join(gpus) or "none visible",
    }
    for target in _ENGINES:
        opened = machine.tensorrt.get(target)
        rows[str(target)] = (opened.library_version or "does not load") if opened is not None else "not installed"
    if plugin is not None:
        built_for = " ".join(f"{number // 10}.{number % 10}" for number in plugin.architectures)
        rows["plugin"] = f"{plugin.version}, packed layout {plugin.layout_version}, for {built_for}: {plugin.library}"
    else:
        rows["plugin"] = "not built"
    rows["ONNX Runtime providers"] = ", ".join(machine.providers)
    rows["libraries"] = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    return rows


def checks_of_machine(machine: Machine) -> Iterator[Check]:
    """What is wrong with the machine itself. What is not there is a note: not every machine runs engines."""
    for target, opened in machine.tensorrt.items():
        if opened.library_version is None:
            reinstall = "install it again, with the extra of this tool: rtx, tensorrt or gpu"
            yield Check(what=str(target), status="problem", text="; ".join(opened.errors), fix=reinstall)
    if not machine.tensorrt:
        fix = 'pip install "fptq-export[rtx]" builds engines without a GPU'
        yield Check(what="TensorRT", status="note", text="not installed: graphs only, no engines", fix=fix)
    if not machine.driver.gpus:
        text = "no NVIDIA GPU is visible: engines can be built (tensorrt-rtx), not run"
        yield Check(what="GPU", status="note", text=text)
    yield from _plugin_checks(machine)


def _versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def _plugin() -> tuple[PluginInfo | None, UserError | None]:
    try:
        return plugin_info(), None
    except UserError as error:
        return None, error


def _plugin_checks(machine: Machine) -> Iterator[Check]:
    plugin, error = machine.plugin, machine.plugin_error
    if error is not None:
        found = error.cause.startswith("is not a plugin library")
        text = f"{error.where}: {error.cause}"
        yield Check(what="plugin", status="problem" if found else "note", text=text, fix=error.hint)
    elif plugin is not None and plugin.layout_version != LAYOUT_VERSION:
        text = f"it reads packed layout {plugin.layout_version}; this tool packs layout {LAYOUT_VERSION}"
        fix = "build it again: python -m fptq_export.plugin build"
        yield Check(what="plugin", status="problem", text=text, fix=fix)
