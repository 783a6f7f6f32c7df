"""What an engine needs of a machine: the library in its version, a GPU it was built for, the plugin."""

from __future__ import annotations

from collections.abc import Iterator

from fptq_export.build.engine_facts import EngineFacts, PluginFacts
from fptq_export.build.targets import Target
from fptq_export.doctor.machine import Machine
from fptq_export.doctor.report import Check
from fptq_export.plugin import PluginInfo

__all__ = ["checks_of_needs"]

_RTX_MAJORS = frozenset({"8", "12"})
"""GPUs that TensorRT for RTX runs on: compute capability 8.x and 12.x."""
_BUILD_FOR = "build it for that GPU: fptq-export build DIR --engine FILE"
_BUILD_PLUGIN = "build the plugin: python -m fptq_export.plugin build"


def checks_of_needs(
    facts: EngineFacts, machine: Machine, compute_capability: str | None, *, recorded: bool
) -> Iterator[Check]:
    """Compare what an engine needs with what is there.

    Args:
        facts: What it was built for.
        machine: Where it should load.
        compute_capability: Of the GPU it should run on; None for those of the machine.
        recorded: Whether the facts are from a manifest; a header says the version alone.
    """
    yield from _library_checks(facts, machine)
    yield from _gpu_checks(facts, machine, compute_capability, recorded=recorded)
    gpus = [compute_capability] if compute_capability else [gpu.compute_capability for gpu in machine.driver.gpus]
    if facts.plugin is not None and facts.carries_plugin:
        yield from _embedded_plugin_checks(facts, facts.plugin, gpus)
    elif facts.plugin_layers:
        yield from _plugin_checks(facts, machine.plugin, gpus)
    elif not recorded:
        text = "nothing says whether the engine needs the plugin"
        yield Check(what="plugin", status="unknown", text=text, fix="give its run directory with --run")


def _library_checks(facts: EngineFacts, machine: Machine) -> Iterator[Check]:
    known = [str(target) for target in Target]
    if facts.target not in known:
        text = f"the manifest names the target {facts.target!r}, which there is not: it was changed"
        yield Check(what="library", status="problem", text=text)
        return
    target = Target(facts.target)
    opened = machine.tensorrt.get(target)
    wanted = facts.library_version
    if opened is None:
        others = ", ".join(str(other) for other in machine.tensorrt)
        has = f"; installed is {others}, which does not load it" if others else ""
        extra = "rtx" if target is Target.TENSORRT_RTX else "tensorrt"
        fix = f'pip install "fptq-export[{extra}]", in version {wanted}'
        yield Check(what="library", status="problem", text=f"it needs {target} {wanted}{has}", fix=fix)
    elif opened.library_version is None:
        text = f"it needs {target} {wanted}, which is installed and does not load"
        yield Check(what="library", status="problem", text=text, fix="install it again")
    elif opened.library_version != wanted:
        older = _numbers(opened.library_version) < _numbers(wanted)
        text = f"{target} {wanted} built it, and {opened.library_version} is installed, which is "
        text += "older" if older else "newer"
        text += ": only the version that built an engine is sure to load it"
        verb = "upgrade to" if older else "install"
        fix = f"{verb} {wanted}, or build it again with the version that is here"
        yield Check(what="library", status="problem", text=text, fix=fix)
    else:
        yield Check(what="library", status="ok", text=f"{target} {wanted} is installed")


def _gpu_checks(
    facts: EngineFacts, machine: Machine, compute_capability: str | None, *, recorded: bool
) -> Iterator[Check]:
    gpus = {gpu.compute_capability: gpu.name for gpu in machine.driver.gpus}
    if compute_capability is not None:
        gpus = {compute_capability: "a GPU"}
    built_for = ", ".join(facts.compute_capabilities)
    if not gpus:
        wanted = f" of compute capability {built_for}" if built_for else ""
        text = "no NVIDIA GPU is visible, and an engine is loaded into one"
        fix = f"load it on a machine with a GPU{wanted}; --compute-capability judges for one that is not here"
        yield Check(what="GPU", status="problem", text=text, fix=fix)
        return
    listed = ", ".join(f"{name} ({number})" for number, name in gpus.items())
    if not facts.compute_capabilities:
        yield from _unrecorded_gpu_checks(facts, gpus, listed, recorded=recorded)
    elif fitting := [number for number in gpus if number in facts.compute_capabilities]:
        text = f"built for {built_for}; {', '.join(fitting)} is there"
        yield Check(what="GPU", status="ok", text=text)
    else:
        text = f"it was built for compute capability {built_for}, and here is {listed}"
        number = next(iter(gpus))
        fix = f"{_BUILD_FOR} --compute-capability {number}"
        if facts.target == str(Target.TENSORRT):
            fix = "build it on that machine: TensorRT builds for the GPU it builds on"
        elif number.partition(".")[0] not in _RTX_MAJORS:
            fix = "TensorRT for RTX does not run on it: build with --target tensorrt on that machine"
        yield Check(what="GPU", status="problem", text=text, fix=fix)


def _unrecorded_gpu_checks(facts: EngineFacts, gpus: dict[str, str], listed: str, *, recorded: bool) -> Iterator[Check]:
    """Where no list of GPUs is recorded: the library chose, or nobody wrote it down."""
    rtx = facts.target == str(Target.TENSORRT_RTX)
    if rtx and not any(number.partition(".")[0] in _RTX_MAJORS for number in gpus):
        text = f"TensorRT for RTX runs on compute capability 8.x and 12.x, and here is {listed}"
        fix = "build with --target tensorrt on that machine"
        yield Check(what="GPU", status="problem", text=text, fix=fix)
    elif rtx and recorded:
        yield Check(what="GPU", status="ok", text=f"built for every GPU of the library; here is {listed}")
    else:
        text = f"nothing says which GPU it was built for; here is {listed}"
        yield Check(what="GPU", status="unknown", text=text)


def _plugin_checks(facts: EngineFacts, plugin: PluginInfo | None, gpus: list[str]) -> Iterator[Check]:
    needs = f"{facts.plugin_layers} of its layers run in the plugin"
    if plugin is None:
        text = f"{needs}, which is missing: the library libfptq_trt.so was not found, or does not load"
        yield Check(what="plugin", status="problem", text=text, fix=_BUILD_PLUGIN)
        return
    wanted = facts.plugin
    if wanted is None:
        text = f"{needs}; which version of it built the engine is not recorded, {plugin.version} is here"
        yield Check(what="plugin", status="unknown", text=text)
    elif (wanted.version, wanted.layout_version) != (plugin.version, plugin.layout_version):
        text = f"{needs}, version {wanted.version} (packed layout {wanted.layout_version}); here is version "
        text += f"{plugin.version} (packed layout {plugin.layout_version})"
        fix = f"build the plugin of fptq-export {wanted.version}, or the engine again"
        yield Check(what="plugin", status="problem", text=text, fix=fix)
    else:
        yield Check(what="plugin", status="ok", text=f"{needs}, version {plugin.version}, which is here")
    yield from _code_checks(plugin.architectures, gpus)


def _embedded_plugin_checks(facts: EngineFacts, plugin: PluginFacts, gpus: list[str]) -> Iterator[Check]:
    text = f"{facts.plugin_layers} of its layers run in the plugin, version {plugin.version}, which the engine carries"
    yield Check(what="plugin", status="ok", text=text)
    yield from _code_checks(plugin.architectures, gpus, ", then the engine again")


def _code_checks(architectures: tuple[int, ...], gpus: list[str], then: str = "") -> Iterator[Check]:
    """A problem where no GPU is one that the plugin has code for; `then` is what follows a new plugin."""
    lacking = [number for number in gpus if not _has_code(architectures, number)]
    if lacking and len(lacking) == len(gpus):
        has = " ".join(f"{number // 10}.{number % 10}" for number in architectures) or "no GPU"
        text = f"the plugin has no code for compute capability {', '.join(lacking)}: it was built for {has}"
        numbers = " ".join(number.replace(".", "") for number in lacking)
        yield Check(what="plugin", status="problem", text=text, fix=f"{_BUILD_PLUGIN} --arch {numbers}{then}")


def _has_code(architectures: tuple[int, ...], compute_capability: str) -> bool:
    """Machine code for the GPU (that of an earlier minor version serves too), or PTX, which later GPUs compile."""
    major, _, minor = compute_capability.partition(".")
    number = 10 * int(major) + int(minor)
    same_major = any(known // 10 == number // 10 and known <= number for known in architectures)
    return same_major or number > max(architectures, default=number)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
