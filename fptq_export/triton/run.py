"""`fptq-export triton`: from a run directory to a model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from fptq_export import __version__
from fptq_export.errors import UserError
from fptq_export.files import write_json_model
from fptq_export.package.manifest import manifest_of_run
from fptq_export.triton.engine_models import engine_models
from fptq_export.triton.models import Models
from fptq_export.triton.options import TritonOptions, Variant
from fptq_export.triton.plugins import carries_plugins, check_plugin, plugins_of
from fptq_export.triton.report import REPORT_FILE, ModelEntry, TritonReport
from fptq_export.triton.repository import staging, write_script, write_version
from fptq_export.triton.router import router_models
from fptq_export.triton.router_options import RouterOptions
from fptq_export.triton.start_script import START_SCRIPT, start_script
from fptq_export.triton.text_models import cpu_models

__all__ = ["run_router", "run_triton"]


def run_triton(options: TritonOptions, command: str) -> TritonReport:
    """Write the models of a run into a repository.

    Args:
        options: What to write.
        command: The command line, for the report.

    Raises:
        UserError: The run has not what the variant needs; nothing was written then. Or another command writes into the
            repository.
    """
    manifest = manifest_of_run(options.source)
    make = cpu_models if options.variant == "cpu" else engine_models
    models = make(options, manifest)
    report = _report(models, command, str(options.source), options.variant)
    _write(models, options.repository, report)
    return report


def run_router(options: RouterOptions, command: str) -> TritonReport:
    """Write a router into a repository.

    Raises:
        UserError: It routes to what is not there; nothing was written then. Or another command writes into the
            repository.
    """
    models = router_models(options)
    report = _report(models, command, None, "router")
    _write(models, options.repository, report)
    return report


def _write(models: Models, repository: Path, report: TritonReport) -> None:
    repository.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_beside(repository, ".lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(str(repository), "another command writes into it", "wait for it") from None
    with lock, staging(repository.absolute()) as scratch:
        check_plugin(repository, models.plugin)
        for model in models.versions:
            write_version(model, repository, scratch)
        plugins = plugins_of(repository)
        script = start_script(plugins[-1] if plugins else None, host_code=carries_plugins(repository))
        write_script(script, repository / START_SCRIPT)
        write_json_model(report, repository / REPORT_FILE)


def _beside(repository: Path, suffix: str) -> Path:
    repository = repository.absolute()
    return repository.with_name(f".{repository.name}{suffix}")


def _report(models: Models, command: str, source: str | None, variant: Variant | Literal["router"]) -> TritonReport:
    return TritonReport(
        tool_version=__version__,
        command=command,
        source=source,
        variant=variant,
        models=tuple(
            ModelEntry(
                name=model.name,
                version=model.version,
                backend=model.config.platform or model.config.backend,
                files=tuple(sorted((*model.copies, *model.texts))),
            )
            for model in models.versions
        ),
        needs=models.needs,
        notes=models.notes,
    )
