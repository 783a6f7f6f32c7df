"""`fptq-export triton`: from a run directory to a model repository."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from fptq_export import __version__
from fptq_export.errors import UserError
from fptq_export.files import write_json_model
from fptq_export.package.manifest import manifest_of_run
from fptq_export.triton.engine_models import engine_models
from fptq_export.triton.models import Models
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.plugins import check_plugin, plugins_of
from fptq_export.triton.report import REPORT_FILE, ModelEntry, TritonReport
from fptq_export.triton.repository import staging, write_script, write_version
from fptq_export.triton.start_script import START_SCRIPT, start_script
from fptq_export.triton.text_models import cpu_models

__all__ = ["run_triton"]


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
    report = _report(options, models, command)
    options.repository.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_beside(options.repository, ".lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(str(options.repository), "another command writes into it", "wait for it") from None
    with lock, staging(options.repository.absolute()) as scratch:
        check_plugin(options.repository, models.plugin)
        for model in models.versions:
            write_version(model, options.repository, scratch)
        plugins = plugins_of(options.repository)
        write_script(start_script(plugins[-1] if plugins else None), options.repository / START_SCRIPT)
        write_json_model(report, options.repository / REPORT_FILE)
    return report


def _beside(repository: Path, suffix: str) -> Path:
    repository = repository.absolute()
    return repository.with_name(f".{repository.name}{suffix}")


def _report(options: TritonOptions, models: Models, command: str) -> TritonReport:
    return TritonReport(
        tool_version=__version__,
        command=command,
        source=str(options.source),
        variant=options.variant,
        models=tuple(
            ModelEntry(
                name=model.name,
                version=model.version,
                backend=model.config.platform or model.config.backend,
                files=tuple(sorted((*model.links, *model.texts))),
            )
            for model in models.versions
        ),
        needs=models.needs,
        notes=models.notes,
    )
