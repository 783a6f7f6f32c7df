"""What an engine is and runs: from its proof and manifest, the builder's log, and TensorRT itself where a GPU is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fptq_export.build.engine_facts import EngineFacts
from fptq_export.build.gpus import driver_of_machine
from fptq_export.build.layer_list import EngineLayer, layers_from_log, layers_from_text
from fptq_export.build.open_engine import open_engine
from fptq_export.build.plan_header import header_from_file, what_instead
from fptq_export.build.proof import Proof, find_all
from fptq_export.build.targets import Target, is_installed
from fptq_export.errors import PrecisionError, UserError
from fptq_export.files import read_json_model, sha256_from_file
from fptq_export.inspect.report import Cell, Inspection, Section
from fptq_export.package.run_of_engine import EngineRun, recorded, run_of_engine
from fptq_export.plugin import library_for_loading
from fptq_export.policy import Policy, read_policy

__all__ = ["inspect_engine", "inspect_proof", "sections_from_proof"]


def inspect_engine(path: Path, directory: Path | None = None) -> Inspection:
    """Look at an engine.

    Args:
        path: Its file.
        directory: Its run directory; None looks beside it.

    Raises:
        UserError: It is not an engine, or its manifest cannot be read.
    """
    header, instead = header_from_file(path), what_instead(path)
    if header is None and instead is not None:
        raise UserError(str(path), f"is not an engine: it is {instead}", "give an engine, .onnx, policy.json or run")
    size = path.stat().st_size
    about: list[tuple[Cell, ...]] = [("file", f"{size} bytes")]
    files: list[str] = []
    if header is not None:
        about.append(("header", f"TensorRT for RTX {header.library_version}, {header.file_bytes} bytes"))
        if header.file_bytes != size:
            files.append(f"{path}: has {size} bytes, its header says {header.file_bytes}: it is damaged")
    run = run_of_engine(path, directory)
    about.append(("run", str(run.directory) if run is not None else "no manifest beside it names it; see --run"))
    if run is None:
        section = Section(name="about", title=path.name, columns=("what", "value"), rows=tuple(about))
        return Inspection(path=str(path), kind="engine", sections=(section,), file_problems=tuple(files))
    about.append(("command", run.manifest.command))
    if not run.is_same:
        files.append(f"{path}: is not the engine that {run.directory} recorded (SHA-256): one of the two was changed")
    section = Section(name="about", title=path.name, columns=("what", "value"), rows=tuple(about))
    sections, precision, changed = _looked_at_run(path, run)
    return Inspection(
        path=str(path),
        kind="engine",
        sections=(section, *sections),
        precision_problems=precision,
        file_problems=(*files, *changed),
    )


def inspect_proof(path: Path) -> Inspection:
    """Look at `proof.json`.

    Raises:
        UserErrors: It is not one.
    """
    proof = read_json_model(path, Proof)
    return Inspection(
        path=str(path), kind="proof", sections=sections_from_proof(proof), precision_problems=proof.problems
    )


def sections_from_proof(proof: Proof) -> tuple[Section, ...]:
    """The tables of a proof: what the engine was built for, its layers by what they run, and those to look at."""
    kinds = Counter((item.policy, item.weights, item.activation, item.verdict) for item in proof.layers)
    rows = tuple((*kind, count) for kind, count in kinds.most_common())
    columns = ("policy", "weights in the engine", "activations in the engine", "verdict", "layers")
    layers = Section(name="layers", title=f"layers, read from {proof.source}", columns=columns, rows=rows)
    others = tuple(
        (item.layer, item.policy, item.verdict, "; ".join(item.evidence))
        for item in proof.layers
        if item.verdict != "proven"
    )
    evidence = ("layer", "policy", "verdict", "evidence")
    unproven = Section(name="unproven", title="not proven in full", columns=evidence, rows=others)
    limits = Section(
        name="limits",
        title="what a layer list cannot show",
        columns=("limit",),
        rows=tuple((text,) for text in proof.limits),
    )
    return tuple(section for section in (_built_for(proof.engine), layers, unproven, limits) if section.rows)


def _built_for(facts: EngineFacts) -> Section:
    rows: list[tuple[Cell, ...]] = [
        ("target", f"{facts.target} {facts.library_version}"),
        ("compute capabilities", ", ".join(facts.compute_capabilities) or "the library's choice"),
    ]
    if facts.plugin is not None:
        rows.append(("plugin", f"{facts.plugin.version}, packed layout {facts.plugin.layout_version}"))
        rows.append(("plugin library", "in the engine" if facts.carries_plugin else "beside the engine"))
        rows.append(("layers in the plugin", facts.plugin_layers))
    for index, profile in enumerate(facts.profiles or ()):
        for item in profile:
            shapes = " | ".join("x".join(map(str, shape)) for shape in (item.minimum, item.optimum, item.maximum))
            rows.append((f"profile {index}, {item.name}: least | best | most", shapes))
    return Section(name="built_for", title="what it was built for", columns=("what", "value"), rows=tuple(rows))


def _looked_at_run(engine: Path, run: EngineRun) -> tuple[tuple[Section, ...], tuple[str, ...], tuple[str, ...]]:
    """Tables, precision problems and file problems of an engine whose run is known."""
    path = run.directory / "proof.json"
    changed = tuple(
        f"{run.directory / name}: has changed since the engine was built"
        for name in ("policy.json", "proof.json", "build.log")
        if _has_changed(run, name)
    )
    if not path.is_file():
        note = Section(name="proof", title="proof", columns=("what",), rows=(("there is no proof.json; build again",),))
        return (note,), (), changed
    proof = read_json_model(path, Proof)
    problems = list(proof.problems)
    if (run.directory / "policy.json").is_file():
        problems += _differences(read_policy(run.directory / "policy.json"), proof)
    sections = list(sections_from_proof(proof))
    for source, layers in _layer_lists(engine, run, proof):
        _, found = find_all(layers, proof.expected)
        problems += [f"{source}: {problem}" for problem in found]
        rows = tuple(Counter(layer.type for layer in layers).most_common())
        title = f"layers of {source}, {'compared with the proof' if not found else 'which contradict the proof'}"
        sections.append(Section(name="layer_types", title=title, columns=("type", "layers"), rows=rows))
    return tuple(sections), tuple(problems), changed


def _has_changed(run: EngineRun, name: str) -> bool:
    record, path = recorded(run, name), run.directory / name
    return record is not None and path.is_file() and sha256_from_file(path) != record.sha256


def _differences(policy: Policy, proof: Proof) -> list[str]:
    """Layers that the engine runs otherwise than the policy that lies there now."""
    proven = {item.layer: item.policy for item in proof.layers}
    wanted = {path: layer.runs for path, layer in policy.layers.items()}
    wanted |= {path: entry.precision for path, entry in policy.convolutions.items()}
    return [
        f"{path}: the policy says {wanted.get(path, 'nothing')}, the engine was built for {proven.get(path, 'nothing')}"
        for path in dict.fromkeys((*wanted, *proven))
        if wanted.get(path) != proven.get(path)
    ]


def _layer_lists(engine: Path, run: EngineRun, proof: Proof) -> list[tuple[str, Sequence[EngineLayer]]]:
    """The layers as the builder's log has them, and as TensorRT says them of the engine where it can open it."""
    lists: list[tuple[str, Sequence[EngineLayer]]] = []
    log = run.directory / "build.log"
    if log.is_file():
        lists.append((log.name, layers_from_log(log)))
    target = Target(proof.engine.target)
    if is_installed(target) and driver_of_machine().gpus:
        library = library_for_loading() if proof.engine.needs_library else None
        opened = open_engine(target, engine, library, host_code=run.is_same and proof.engine.carries_plugin)
        if opened.opened:
            try:
                lists.append(("the engine itself", layers_from_text(opened.layers.splitlines(), str(engine))))
            except PrecisionError as error:
                raise UserError(str(engine), str(error), "see build.log, which has the same layers") from error
    return lists
