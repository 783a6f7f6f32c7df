"""Will an engine load here: the file, what is recorded of it, and what it needs of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fptq_export.build.engine_facts import EngineFacts, facts_from_summary
from fptq_export.build.open_engine import open_engine
from fptq_export.build.plan_header import PlanHeader, header_from_file, what_instead
from fptq_export.build.proof import Proof
from fptq_export.build.targets import Target
from fptq_export.doctor.machine import Machine
from fptq_export.doctor.needs import checks_of_needs
from fptq_export.doctor.report import Check, PlanReport
from fptq_export.errors import UserError
from fptq_export.files import read_json_model, sha256_from_file
from fptq_export.package.run_of_engine import BUILD, EngineRun, recorded, run_of_engine

__all__ = ["PlanQuestion", "report_on_plan"]

_BUILD_AGAIN = "build it again: fptq-export build DIR --engine FILE"
_COPY_AGAIN = f"copy it again, or {_BUILD_AGAIN}"


@dataclass(frozen=True)
class PlanQuestion:
    """An engine file, and where it should load."""

    path: Path
    run: Path | None = None
    """Run directory; None looks beside the engine."""
    compute_capability: str | None = None
    """Judge for a GPU like this, e.g. `8.9`; None is for those of the machine."""


def report_on_plan(question: PlanQuestion, machine: Machine) -> PlanReport:
    """Look at an engine file. What is wrong is in the checks; nothing is raised for it.

    Args:
        question: Which file, and for which GPU.
        machine: Where it should load.
    """
    checks = list(_file_checks(question.path))
    if any(check.status == "problem" and check.what == "file" for check in checks):
        return _report(question, None, checks)
    header = header_from_file(question.path)
    run, facts = None, None
    try:
        run = run_of_engine(question.path, question.run)
        facts = facts_from_summary(run.manifest.stages[BUILD].summary) if run is not None else None
    except UserError as error:
        checks.append(Check(what="manifest", status="problem", text=f"{error.where}: {error.cause}", fix=error.hint))
    except ValidationError:
        text = "its figures of the build are not such as this tool writes: it was changed"
        checks.append(Check(what="manifest", status="problem", text=text, fix=_BUILD_AGAIN))
    checks += _run_checks(run, facts, header)
    if facts is None and header is not None:
        facts = EngineFacts(
            target=str(Target.TENSORRT_RTX), library_version=header.library_version, compute_capabilities=()
        )
    if facts is None:
        text = "no manifest names it, and its header is not one this tool knows: nothing says what it needs"
        checks.append(Check(what="needs", status="unknown", text=text, fix="give its run directory with --run"))
    else:
        checks += checks_of_needs(facts, machine, question.compute_capability, recorded=run is not None)
        checks += _opened(question, facts, machine, checks)
    return _report(question, facts, checks)


def _report(question: PlanQuestion, facts: EngineFacts | None, checks: list[Check]) -> PlanReport:
    problems = [check for check in checks if check.status == "problem"]
    unknown = [check for check in checks if check.status == "unknown"]
    place = "here" if question.compute_capability is None else f"on compute capability {question.compute_capability}"
    if problems:
        verdict = f"no, or not as it was built: {problems[0].text}"
    elif any(check.what == "opened" and check.status == "ok" for check in checks):
        verdict = "yes: TensorRT opened it"
    elif unknown:
        verdict = f"nothing speaks against loading it {place}, but not all could be looked at: {unknown[0].text}"
    else:
        verdict = f"yes: what it needs is {place}, by what is recorded of it"
    return PlanReport(path=str(question.path), facts=facts, checks=tuple(checks), verdict=verdict)


def _file_checks(path: Path) -> Iterator[Check]:
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "no such file"
        yield Check(what="file", status="problem", text=f"{path}: {kind}", fix="give the engine's file")
        return
    header = header_from_file(path)
    size = path.stat().st_size
    if header is None:
        instead = what_instead(path)
        if instead is not None:
            yield Check(what="file", status="problem", text=f"it is not an engine: it is {instead}", fix=_COPY_AGAIN)
    elif size != header.file_bytes:
        word = "truncated" if size < header.file_bytes else "longer than it should be"
        text = f"it is {word}: {size} bytes, its header says {header.file_bytes}"
        yield Check(what="file", status="problem", text=text, fix=_COPY_AGAIN)
    else:
        text = f"an engine of TensorRT for RTX {header.library_version}, complete: {size} bytes"
        yield Check(what="file", status="ok", text=text)


def _run_checks(run: EngineRun | None, facts: EngineFacts | None, header: PlanHeader | None) -> Iterator[Check]:
    """Whether file, manifest, policy and proof belong together."""
    if run is None:
        text = "none beside it names this engine"
        yield Check(what="manifest", status="note", text=text, fix="give its run directory with --run")
        return
    if run.is_same:
        text = f"{run.directory}: the engine is the one that was recorded (SHA-256)"
        yield Check(what="manifest", status="ok", text=text)
    else:
        text = f"the engine is not the one that {run.directory} recorded: its SHA-256 is {run.sha256[:12]}..., not "
        text += f"{run.record.sha256[:12]}...; one of the two was changed"
        yield Check(what="manifest", status="problem", text=text, fix=_COPY_AGAIN)
    if facts is not None and header is not None and facts.library_version != header.library_version:
        text = f"it says that {facts.library_version} built the engine, whose header says {header.library_version}: "
        yield Check(what="manifest", status="problem", text=f"{text}the manifest was changed", fix=_BUILD_AGAIN)
    yield from _policy_checks(run)
    yield from _proof_checks(run, facts)


def _policy_checks(run: EngineRun) -> Iterator[Check]:
    record, path = recorded(run, "policy.json"), run.directory / "policy.json"
    if record is None or not path.is_file():
        return
    if sha256_from_file(path) != record.sha256:
        text = f"the engine was built from another policy: {path} has changed since"
        fix = "build from it: fptq-export MODEL -o DIR --policy DIR/policy.json --engine FILE"
        yield Check(what="policy", status="problem", text=text, fix=fix)
    else:
        yield Check(what="policy", status="ok", text="the engine was built from it")


def _proof_checks(run: EngineRun, facts: EngineFacts | None) -> Iterator[Check]:
    record, path = recorded(run, "proof.json"), run.directory / "proof.json"
    if record is None:
        text = "the engine was built before this tool wrote proofs"
        yield Check(what="proof", status="note", text=text, fix=_BUILD_AGAIN)
        return
    if not path.is_file():
        yield Check(what="proof", status="note", text=f"{path} is not here, so it was not looked at")
        return
    if sha256_from_file(path) != record.sha256:
        text = f"{path} is not the one that was recorded: it or the manifest was changed"
        yield Check(what="proof", status="problem", text=text, fix=_BUILD_AGAIN)
        return
    try:
        proof = read_json_model(path, Proof)
    except UserError as error:
        yield Check(what="proof", status="problem", text=f"{error.where}: {error.cause}", fix=_BUILD_AGAIN)
        return
    if facts is not None and proof.engine != facts:
        changed = [name for name in EngineFacts.model_fields if getattr(proof.engine, name) != getattr(facts, name)]
        text = f"the manifest was changed: its {', '.join(changed)} is not that of proof.json"
        yield Check(what="manifest", status="problem", text=text, fix=_BUILD_AGAIN)
    proven = proof.verdicts().get("proven", 0)
    yield Check(what="proof", status="ok", text=f"{proven} of {len(proof.layers)} layers proven (inspect shows them)")


def _opened(question: PlanQuestion, facts: EngineFacts, machine: Machine, checks: list[Check]) -> Iterator[Check]:
    """Have TensorRT open it, where nothing speaks against it and there is a GPU."""
    if any(check.status == "problem" for check in checks) or not machine.driver.gpus or question.compute_capability:
        return
    plugin = machine.plugin.library if machine.plugin is not None and facts.needs_library else None
    opened = open_engine(Target(facts.target), question.path, plugin, host_code=facts.carries_plugin)
    if opened.opened:
        yield Check(what="opened", status="ok", text=f"TensorRT {opened.library_version} opened it on this GPU")
    else:
        text = "TensorRT does not open it: " + "; ".join(opened.errors or ("it says no reason",))
        yield Check(what="opened", status="problem", text=text, fix=_BUILD_AGAIN)
