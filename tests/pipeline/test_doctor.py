"""`fptq-export doctor`: a healthy engine is called healthy, and every reason not to load is named with its fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fptq_export import __version__
from fptq_export.build.engine_facts import EngineFacts, PluginFacts
from fptq_export.build.gpus import Driver, Gpu
from fptq_export.build.open_engine import Opened, open_engine
from fptq_export.build.targets import Target
from fptq_export.doctor import plan
from fptq_export.doctor.machine import Machine, checks_of_machine
from fptq_export.doctor.needs import checks_of_needs
from fptq_export.doctor.plan import PlanQuestion, report_on_plan
from fptq_export.doctor.report import Check, PlanReport
from fptq_export.errors import ExitCode, UserError
from fptq_export.files import sha256_from_file
from fptq_export.packing import LAYOUT_VERSION
from fptq_export.plugin import PluginInfo
from tests.pipeline.conftest import Command

VERSION = "1.7.1.116"
ADA = "8.9"
PLUGIN = PluginInfo(
    library=Path("libfptq_trt.so"),
    version=__version__,
    layout_version=LAYOUT_VERSION,
    kernels="cuda",
    architectures=(80, 89),
    tensorrt_headers="10.14",
)
MACHINE = Machine(
    driver=Driver("13.0", (Gpu("NVIDIA RTX 4090", ADA),)),
    tensorrt={Target.TENSORRT_RTX: Opened(VERSION, False, "", ())},
    plugin=PLUGIN,
)
NEEDS = EngineFacts(
    target="tensorrt-rtx",
    library_version=VERSION,
    compute_capabilities=("8.0", ADA),
    plugin_layers=4,
    plugin=PluginFacts(
        version=__version__, layout_version=LAYOUT_VERSION, architectures=(80, 89), tensorrt_headers="10.14", sha256=""
    ),
)


@pytest.fixture
def engine(finished_run: Path, run_copy: Path, tmp_path: Path) -> Path:
    """A copy of the engine beside the copy of its run; both may be changed."""
    return Path(shutil.copyfile(finished_run / "out.plan", tmp_path / "out.plan"))


def asked(engine: Path, compute_capability: str = ADA) -> PlanReport:
    """What is said of an engine, for a GPU that need not be here."""
    report = report_on_plan(PlanQuestion(engine, compute_capability=compute_capability), machine_for(engine))
    return report


def machine_for(engine: Path) -> Machine:
    """A machine with the TensorRT that built the engine, whichever it is, and a GPU."""
    header = report_on_plan(PlanQuestion(engine, compute_capability=ADA), MACHINE).facts
    version = header.library_version if header is not None else VERSION
    return replace(MACHINE, tensorrt={Target.TENSORRT_RTX: Opened(version, False, "", ())})


def problems(checks: tuple[Check, ...]) -> dict[str, str]:
    """What is wrong -> why."""
    return {check.what: check.text for check in checks if check.status == "problem"}


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_healthy_engine_will_load(engine: Path) -> None:
    """File, manifest, policy, proof, library and GPU are looked at, and each is in order."""
    report = asked(engine)
    assert {check.what: check.status for check in report.checks} == dict.fromkeys(
        ("file", "manifest", "policy", "proof", "library", "GPU"), "ok"
    )
    assert report.verdict.startswith("yes")


def test_commands_and_their_exit_codes(engine: Path, command: Command) -> None:
    """0 where it will load, 1 for a GPU it was not built for; the machine alone is healthy without a GPU."""
    healthy = command("doctor", engine, "--compute-capability", ADA, "--json")
    assert healthy.code == ExitCode.OK, healthy.out
    assert json.loads(healthy.out)["plan"]["verdict"].startswith("yes")
    other = command("doctor", engine, "--compute-capability", "9.0")
    assert other.code == ExitCode.USER_ERROR
    assert "Will it load? no" in other.out
    alone = command("doctor")
    assert alone.code == ExitCode.OK, alone.out
    assert "ONNX Runtime providers" in alone.out
    assert command("doctor", engine, "--compute-capability", "ada").code == ExitCode.USER_ERROR


def test_truncated_engine_is_named(engine: Path) -> None:
    """Its header says how long it was; TensorRT itself would speak of an assertion."""
    engine.write_bytes(engine.read_bytes()[:-1000])
    report = asked(engine)
    assert "it is truncated" in problems(report.checks)["file"]
    assert report.verdict.startswith("no")


def test_file_that_is_no_engine_is_named(tmp_path: Path) -> None:
    """A missing file, a directory, and a Git LFS pointer."""
    pointer = tmp_path / "out.plan"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for path, cause in ((pointer, "Git LFS"), (tmp_path, "is a directory"), (tmp_path / "no.plan", "no such file")):
        assert cause in problems(asked(path).checks)["file"]


def test_changed_engine_is_named(engine: Path) -> None:
    """One flipped bit, the length unchanged: the hash is not the manifest's."""
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    assert "SHA-256" in problems(asked(engine).checks)["manifest"]


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("compute_capabilities", ["9.0"], "its compute_capabilities is not that of proof.json"),
        ("library_version", "1.8.0.1", "the manifest was changed"),
        ("surprise", 1, "not such as this tool writes"),
    ],
)
def test_tampered_manifest_is_named(engine: Path, run_copy: Path, field: str, value: object, cause: str) -> None:
    """A fact that was edited contradicts the proof, the engine's header, or the form of manifests."""
    edited(run_copy / "manifest.json", lambda data: data["stages"]["build"]["summary"]["engine"].update({field: value}))
    assert cause in " ".join(check.text for check in asked(engine).checks if check.what == "manifest")
    assert "manifest" in problems(asked(engine).checks)


def test_tampered_proof_is_named(engine: Path, run_copy: Path) -> None:
    """Another file than was recorded, and one that is recorded and no proof, are problems and no tracebacks."""
    path = run_copy / "proof.json"
    path.write_text("{}")
    assert "is not the one that was recorded" in problems(asked(engine).checks)["proof"]

    def record_it(data: dict[str, Any]) -> None:
        for file in data["stages"]["build"]["outputs"]:
            if file["path"] == path.name:
                file["sha256"] = sha256_from_file(path)

    edited(run_copy / "manifest.json", record_it)
    assert "problems" in problems(asked(engine).checks)["proof"]


def test_engine_of_another_policy_is_named(engine: Path, run_copy: Path) -> None:
    """The policy that lies there now is not the one that was built."""
    edited(run_copy / "policy.json", lambda data: data.update(model="another"))
    assert "built from another policy" in problems(asked(engine).checks)["policy"]


def test_engine_without_a_manifest_is_judged_by_its_header(engine: Path, tmp_path: Path) -> None:
    """Nothing is made up: the version is known, what it was built for and whether it needs the plugin is not."""
    lone = tmp_path / "lone" / "out.plan"
    lone.parent.mkdir()
    shutil.copyfile(engine, lone)
    report = asked(lone)
    assert problems(report.checks) == {}
    assert {check.what for check in report.checks if check.status == "unknown"} == {"GPU", "plugin"}
    assert not report.verdict.startswith("yes")


def test_manifest_of_before_there_were_facts_is_read(engine: Path, run_copy: Path) -> None:
    """Engines of earlier versions stay explained: what was not recorded then is not held against them."""

    def as_before(data: dict[str, Any]) -> None:
        summary = data["stages"]["build"]["summary"]
        for name in ("engine", "verdicts"):
            del summary[name]
        outputs = data["stages"]["build"]["outputs"]
        data["stages"]["build"]["outputs"] = [file for file in outputs if file["path"] != "proof.json"]

    edited(run_copy / "manifest.json", as_before)
    report = asked(engine)
    assert problems(report.checks) == {}
    assert {check.what: check.status for check in report.checks}["proof"] == "note"


def test_machine_with_all_it_needs_is_not_complained_about() -> None:
    """Library, GPU and plugin are there: three times ok."""
    found = [check.status for check in checks_of_needs(NEEDS, MACHINE, None, recorded=True)]
    assert found == ["ok", "ok", "ok"]


@pytest.mark.parametrize(
    ("machine", "compute_capability", "what", "cause"),
    [
        (replace(MACHINE, plugin=None), None, "plugin", "which is missing"),
        (replace(MACHINE, plugin=PLUGIN.model_copy(update={"version": "9"})), None, "plugin", "here is version 9"),
        (replace(MACHINE, plugin=PLUGIN.model_copy(update={"architectures": (90,)})), None, "plugin", "no code for"),
        (MACHINE, "12.0", "GPU", "it was built for compute capability 8.0, 8.9, and here is a GPU (12.0)"),
        (replace(MACHINE, driver=Driver(None, ())), None, "GPU", "no NVIDIA GPU is visible"),
        (replace(MACHINE, tensorrt={}), None, "library", f"it needs tensorrt-rtx {VERSION}"),
        (
            replace(MACHINE, tensorrt={Target.TENSORRT: Opened("11.1", False, "", ())}),
            None,
            "library",
            "installed is tensorrt, which does not load it",
        ),
        (
            replace(MACHINE, tensorrt={Target.TENSORRT_RTX: Opened("1.6.0.1", False, "", ())}),
            None,
            "library",
            "is installed, which is older",
        ),
        (
            replace(MACHINE, tensorrt={Target.TENSORRT_RTX: Opened(None, False, "", ("no libcudart",))}),
            None,
            "library",
            "does not load",
        ),
    ],
    ids=["no plugin", "other plugin", "plugin code", "GPU", "no GPU", "no library", "flavour", "older", "broken"],
)
def test_what_is_missing_is_named_alone(
    machine: Machine, compute_capability: str | None, what: str, cause: str
) -> None:
    """Each thing that is missing or different, with its next step, and nothing else beside it."""
    checks = tuple(checks_of_needs(NEEDS, machine, compute_capability, recorded=True))
    found = problems(checks)
    assert list(found) == [what]
    assert cause in found[what]
    assert all(check.fix for check in checks if check.status == "problem")


def test_plugin_in_the_engine_is_judged_without_one_beside_it() -> None:
    """None is asked for; that it has no code for the GPU is still found, and mended by building both again."""
    assert NEEDS.plugin is not None
    plugin = NEEDS.plugin.model_copy(update={"embedded": True})
    carrying = NEEDS.model_copy(update={"plugin": plugin})
    alone = replace(MACHINE, plugin=None)
    assert not problems(tuple(checks_of_needs(carrying, alone, None, recorded=True)))
    old = carrying.model_copy(update={"plugin": plugin.model_copy(update={"architectures": (90,)})})
    (found,) = (check for check in checks_of_needs(old, alone, None, recorded=True) if check.status == "problem")
    assert "no code for compute capability 8.9" in found.text
    assert found.fix == "build the plugin: python -m fptq_export.plugin build --arch 89, then the engine again"


@pytest.mark.parametrize("embedded", [True, False])
def test_code_of_an_engine_runs_only_where_its_run_put_it_there(
    engine: Path, run_copy: Path, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    """A recorded engine that carries its plugin is opened with that; another with the library that is here."""
    facts = json.loads((run_copy / "proof.json").read_text())["engine"] | {"plugin_layers": 4}
    assert NEEDS.plugin is not None
    facts["plugin"] = NEEDS.plugin.model_copy(update={"embedded": embedded}).model_dump(mode="json")
    edited(run_copy / "proof.json", lambda data: data.update(engine=facts))

    def record_it(data: dict[str, Any]) -> None:
        data["stages"]["build"]["summary"]["engine"] = facts
        for file in data["stages"]["build"]["outputs"]:
            if file["path"] == "proof.json":
                file["sha256"] = sha256_from_file(run_copy / "proof.json")

    edited(run_copy / "manifest.json", record_it)
    opened: list[tuple[Path | None, bool]] = []

    def open_it(target: Target, path: Path, plugin: Path | None, *, host_code: bool) -> Opened:
        opened.append((plugin, host_code))
        return Opened(VERSION, True, "", ())

    monkeypatch.setattr(plan, "open_engine", open_it)
    report = report_on_plan(PlanQuestion(engine), machine_for(engine))
    assert report.verdict == "yes: TensorRT opened it"
    assert opened == [(None, True) if embedded else (PLUGIN.library, False)]


def test_broken_parts_of_a_machine_are_problems_and_missing_ones_are_not() -> None:
    """A machine without GPU, TensorRT and plugin traces and quantizes; one with a broken library is to be mended."""
    absent = UserError("libfptq_trt.so", "the plugin library is not in build", "build it")
    bare = Machine(Driver(None, ()), {}, None, absent)
    assert {check.status for check in checks_of_machine(bare)} == {"note"}
    broken = {Target.TENSORRT_RTX: Opened(None, False, "", ("no libcudart",))}
    assert "no libcudart" in problems(tuple(checks_of_machine(replace(MACHINE, tensorrt=broken))))["tensorrt-rtx"]
    old = PLUGIN.model_copy(update={"layout_version": LAYOUT_VERSION + 1})
    assert "packed layout" in problems(tuple(checks_of_machine(replace(MACHINE, plugin=old))))["plugin"]
    assert not list(checks_of_machine(MACHINE))


def test_what_tensorrt_says_of_an_engine_is_passed_on(engine: Path) -> None:
    """Without a GPU it opens none, whatever the file; its own words come back, and no layers."""
    engine.write_bytes(engine.read_bytes()[:-1000])
    opened = open_engine(Target.TENSORRT_RTX, engine)
    assert (opened.opened, opened.layers) == (False, "")
    assert opened.library_version is not None
    assert "plan.header.size == blobSize" in opened.errors[0]
