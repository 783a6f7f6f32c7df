"""`fptq-export eval`: check everything, then run one system after the other."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from calib.batches import TextOptions, TokenBatches, evaluation_batches
from calib.checks import check_checkpoint
from calib.documents import needs_tokenizer
from calib.load import tokenizer_from_checkpoint
from fptq_export import __version__
from fptq_export.errors import UserError
from fptq_export.evaluate.models import LogitsModel, perplexity_from_windows
from fptq_export.evaluate.options import EvalOptions, System
from fptq_export.evaluate.report import EvalReport, SystemRecord, TextResult
from fptq_export.evaluate.systems import RUNS, Source, chosen_systems, opened_system, source_from_option
from fptq_export.files import write_json_model
from fptq_export.memory import PeakMemory
from fptq_export.package.manifest import read_manifest
from fptq_export.pipeline.environment import environment
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fptq_export.evaluate.tasks import LoadedTasks

__all__ = ["run_eval"]

MAX_LENGTH = 2048
"""Longest input when the user names none: one run of it holds 4 x 2048 x V bytes of logits."""


@dataclass(frozen=True)
class _Work:
    """All that is run, found and checked."""

    source: Source
    texts: Mapping[str, TokenBatches]
    tasks: LoadedTasks | None
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int


def run_eval(options: EvalOptions, command: str, console: Console, progress: Progress) -> tuple[EvalReport, Path]:
    """Evaluate the systems of a run directory, or one model.

    Args:
        options: What to measure.
        command: The command line, for the report.
        console: Where systems that are left out are named.
        progress: Where long work reports.

    Returns:
        The report and the file it lies in, which is written after each system.

    Raises:
        UserError: Anything the user can mend; before the first model runs, as far as that can be known.
    """
    if not options.text and not options.tasks:
        raise UserError("eval", "there is nothing to measure", "give --text, --tasks or both")
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks", "needs the library lm-eval", "pip install 'fptq-export[eval]'")
    output = _output_directory(options)
    with ExitStack() as stack:
        stack.enter_context(output.locked())
        run = Path(options.source)
        if _is_run(run) and run.resolve() != output.path.resolve():
            stack.enter_context(RunDirectory(run).locked())
        source = source_from_option(options.source, output.path, options.trust_remote_code, progress)
        systems, left_out = chosen_systems(source, options.systems)
        for system, why in left_out.items():
            if source.directory is not None:
                console.print(f"{system}: left out, {why}", markup=False)
        hashes = {system: source.hashes(system) for system in systems}
        work = _work(source, options, systems, progress)
        report = _empty_report(options, command, work)
        for system in systems:
            report = _with_system(report, work, system, hashes[system], progress)
            write_json_model(report, output.eval)
    return report, output.eval


def _is_run(path: Path) -> bool:
    return read_manifest(path) is not None


def _output_directory(options: EvalOptions) -> RunDirectory:
    if options.output is not None:
        return RunDirectory(options.output)
    source = Path(options.source)
    return RunDirectory(source if _is_run(source) else Path(f"{source.stem}-eval"))


def _work(source: Source, options: EvalOptions, systems: tuple[System, ...], progress: Progress) -> _Work:
    reads_text = bool(options.tasks) or any(map(needs_tokenizer, options.text))
    tokenizer = tokenizer_from_checkpoint(source.checkpoint) if reads_text else None
    texts = {
        text: evaluation_batches(
            TextOptions(text, options.eval_windows, options.eval_seq, options.seed), tokenizer, source.vocab_size
        )
        for text in options.text
    }
    positions = getattr(source.checkpoint.config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
    if options.max_length is not None and options.max_length > positions:
        cause = f"is {options.max_length}, and the model has {positions} positions"
        raise UserError("--max-length", cause, f"give at most {positions}")
    tasks = None
    if options.tasks:
        from fptq_export.evaluate.tasks import load_tasks

        with progress.task("loading tasks", None):
            tasks = load_tasks(options)
    if set(systems) != {"onnx"}:
        check_checkpoint(source.checkpoint, progress)
    return _Work(source, texts, tasks, tokenizer, options.max_length or min(positions, MAX_LENGTH))


def _empty_report(options: EvalOptions, command: str, work: _Work) -> EvalReport:
    libraries = {name: version(name) for name in ("lm_eval", "datasets")} if work.tasks is not None else {}
    return EvalReport(
        tool_version=__version__,
        command=command,
        environment={**environment(), **libraries},
        model=work.source.checkpoint.name,
        max_length=work.max_length,
        seed=options.seed,
        limit=options.limit,
        systems=(),
        texts=(),
        tasks=(),
    )


def _with_system(
    report: EvalReport, work: _Work, system: System, hashes: dict[str, str], progress: Progress
) -> EvalReport:
    """Measure one system and put its figures beside the others'."""
    started = time.monotonic()
    changes: dict[str, Any] = {}
    with PeakMemory() as memory, opened_system(work.source, system) as model:
        known = {text.source: text for text in report.texts}
        changes["texts"] = tuple(
            _text_result(known.get(name), name, batches, system, model, progress)
            for name, batches in work.texts.items()
        )
        if work.tasks is not None:
            changes["tasks"] = _task_results(report, work, system, model, progress)
        # The context ends with the last reference to the model, so that its memory is free for the next one.
        del model
    record = SystemRecord(
        system=system,
        runs=RUNS[system],
        files=hashes,
        seconds=time.monotonic() - started,
        peak_memory_bytes=memory.bytes,
    )
    return report.model_copy(update={**changes, "systems": (*report.systems, record)})


def _text_result(
    known: TextResult | None, name: str, batches: TokenBatches, system: System, model: LogitsModel, progress: Progress
) -> TextResult:
    figures = perplexity_from_windows(model, batches.tokens, name, progress)
    return TextResult(
        source=name,
        description=batches.description,
        sha256=batches.sha256,
        windows=batches.tokens.shape[0],
        window_tokens=batches.tokens.shape[1],
        perplexity={**(known.perplexity if known is not None else {}), system: figures},
    )


def _task_results(
    report: EvalReport, work: _Work, system: System, model: LogitsModel, progress: Progress
) -> tuple[Any, ...]:
    from fptq_export.evaluate.language_model import HarnessModel
    from fptq_export.evaluate.tasks import merged_results

    assert work.tasks is not None
    assert work.tokenizer is not None, "tasks need one, so it was read"
    harness = HarnessModel(model, work.tokenizer, work.max_length, progress)
    return merged_results(report.tasks, work.tasks.results(system, harness))
