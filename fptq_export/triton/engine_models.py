"""The engine as a model, and the text model that calls it."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from fptq_export.build.engine_facts import EngineFacts, facts_from_summary
from fptq_export.build.targets import Target
from fptq_export.errors import UserError
from fptq_export.files import sha256_from_file
from fptq_export.package.manifest import Manifest
from fptq_export.package.run_of_engine import BUILD, engines_of_run, run_of_engine
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.plugin import library_for_loading, library_that_registers
from fptq_export.triton.models import MODEL_FILE, Models, model_file, model_name
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.plan_config import plan_config
from fptq_export.triton.plan_facts import plan_facts
from fptq_export.triton.plugins import EMBEDDED_PLUGIN_FILE
from fptq_export.triton.repository import ModelVersion, next_version
from fptq_export.triton.serving.called_plan import CALLED_PLAN_FILE, CalledPlan, text_problem
from fptq_export.triton.text_config import text_config
from fptq_export.triton.text_models import NEEDS_PACKAGE, tokenizer_copies

__all__ = ["engine_models"]

_PLAN_FILE = "model.plan"


def engine_models(options: TritonOptions, manifest: Manifest) -> Models:
    """The `tensorrt_plan` model of an engine; before it, where it writes text, the model that does so with it.

    Raises:
        UserError: There is no engine, it is another one than the run's, Triton cannot load it, or the plugin it needs
            is not there.
    """
    engine, needed = _engine(options, manifest)
    facts = plan_facts(RunDirectory(options.source).w4a8, needed.profiles or ())
    name = model_name(options)
    plan_name = f"{name}-plan"
    version = next_version([options.repository / item for item in (name, plan_name)], options.version)
    # A text that was begun goes on with the engine it was begun with, so that one stays a version longer.
    config = plan_config(plan_name, facts, options, versions=options.keep_versions + 1)
    plugin = _plugin(needed)
    copies = {_PLAN_FILE: engine, **({} if plugin is None else {plugin.name: plugin})}
    plan = ModelVersion(plan_name, config, version, copies, _texts(needed))
    needs = [f"TensorRT {needed.library_version}", *_gpus(needed)]
    if needed.carries_plugin:
        needs.append("leave to run the plugin's code, which is in the engine: start.sh gives it")
    problem = text_problem(facts)
    if problem is not None:
        return Models((plan,), tuple(needs), plugin, notes=(f"no text model: {problem}",))
    text = _text_model(options, name, CalledPlan(plan=plan_name, stateful=_is_stateful(options), facts=facts), version)
    return Models((plan, text), (*needs, NEEDS_PACKAGE), plugin)


def _engine(options: TritonOptions, manifest: Manifest) -> tuple[Path, EngineFacts]:
    built = [options.source / record.path for record in engines_of_run(manifest)]
    engine = options.engine or next(iter(built), None)
    build_it = f"fptq-export build {options.source} --engine FILE --target tensorrt"
    if engine is None:
        raise UserError(str(options.source), "has no engine", f"{build_it}; or take --variant cpu")
    if not engine.is_file():
        raise UserError(str(engine), "no such file", f"{build_it}; or take --variant cpu")
    run = run_of_engine(engine, options.source)
    if run is None or not run.is_same:
        cause = f"is not the engine that {options.source} records"
        raise UserError(str(engine), cause, f"copy it again, or {build_it}")
    try:
        facts = facts_from_summary(manifest.stages[BUILD].summary)
    except ValidationError:
        raise UserError(str(options.source), "its figures of the build were changed", build_it) from None
    if facts.target != Target.TENSORRT:
        cause = f"was built with {facts.target}, whose engines Triton's TensorRT backend does not load"
        raise UserError(str(engine), cause, f"{build_it}; or take --variant cpu")
    if facts.profiles is None:
        raise UserError(str(options.source), "does not record the engine's profiles", build_it)
    return engine, facts


def _plugin(facts: EngineFacts) -> Path | None:
    """The plugin library of an engine that needs it beside itself.

    Raises:
        UserError: It is not built, or is another one than the engine was built with.
    """
    if not facts.needs_library:
        return None
    built_with = library_for_loading()
    if facts.plugin is not None and facts.plugin.sha256 != sha256_from_file(built_with):
        cause = f"is not the library that the engine was built with (sha256 {facts.plugin.sha256[:12]}...)"
        raise UserError(str(built_with), cause, "set FPTQ_PLUGIN_DIR to the folder of that library")
    return library_that_registers()


def _texts(facts: EngineFacts) -> dict[str, str]:
    """What lies beside an engine that carries its plugin, so that later commands know it."""
    if facts.plugin is None or not facts.carries_plugin:
        return {}
    return {EMBEDDED_PLUGIN_FILE: facts.plugin.model_dump_json(indent=2) + "\n"}


def _gpus(facts: EngineFacts) -> tuple[str, ...]:
    listed = ", ".join(facts.compute_capabilities)
    return (f"a GPU of compute capability {listed}",) if listed else ()


def _is_stateful(options: TritonOptions) -> bool:
    return options.variant == "stateful"


def _text_model(options: TritonOptions, name: str, plan: CalledPlan, version: int) -> ModelVersion:
    return ModelVersion(
        name=name,
        config=text_config(name, options),
        version=version,
        copies=tokenizer_copies(options.source),
        texts={
            MODEL_FILE: model_file("fptq_export.triton.serving.engine_model"),
            CALLED_PLAN_FILE: plan.model_dump_json(indent=2) + "\n",
        },
    )
