"""`fptq-export diff`: check everything, then run the reference and one candidate after the other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from calib.batches import TextOptions, TokenBatches, evaluation_batches
from calib.checks import check_checkpoint
from calib.documents import needs_tokenizer
from calib.load import tokenizer_from_checkpoint
from fptq_export import __version__
from fptq_export.diff.options import CANDIDATES, Candidate, DiffOptions
from fptq_export.diff.record import Comparison, Course, StoredLogits, compared_with, course_from_windows, stored_logits
from fptq_export.diff.report import CandidateDiff, DiffReport, GreedyFigures, PartFigures, RunRecord
from fptq_export.diff.save_io import save_io
from fptq_export.errors import UserError
from fptq_export.evaluate.systems import RUNS, Source, graph_session, opened_session, source_from_option
from fptq_export.files import PARTIAL_SUFFIX, sha256_from_file, write_json_model
from fptq_export.memory import PeakMemory
from fptq_export.package.manifest import Manifest, manifest_of_run
from fptq_export.package.run_of_engine import engines_of_run
from fptq_export.pipeline.environment import environment
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.progress import Progress
from fptq_export.runtime.engine_session import engine_problem, opened_engine
from fptq_export.verify.compare import LogitTotals
from fptq_export.verify.sessions import CausalSession

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["run_diff"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class _Work:
    """All that is run, found and checked."""

    source: Source
    manifest: Manifest
    engine: Path | None
    batches: TokenBatches
    course: Course
    tokenizer: PreTrainedTokenizerBase | None
    systems: tuple[Candidate, ...]
    left_out: dict[Candidate, str]

    @property
    def graph(self) -> Path:
        """`model.w4a8.onnx`."""
        return self.source.files("onnx")[0]


@dataclass
class _Measured:
    """Filled in when a run ends."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


def run_diff(options: DiffOptions, command: str, progress: Progress) -> tuple[DiffReport, Path]:
    """Compare the candidates of a run directory with its float model.

    The reference runs first and leaves its logits on disk, so that one model is in memory at a time.

    Args:
        options: What to compare.
        command: The command line, for the report.
        progress: Where long work reports.

    Returns:
        The report and the file it lies in, which is written after each candidate. The thresholds are not looked at.

    Raises:
        UserError: Anything the user can mend; before the first model runs, as far as that can be known.
    """
    run = Path(options.source)
    manifest = _manifest(run)
    output = RunDirectory(options.output if options.output is not None else run)
    with ExitStack() as stack:
        stack.enter_context(output.locked())
        if run.resolve() != output.path.resolve():
            stack.enter_context(RunDirectory(run).locked())
        work = _work(options, manifest, output.path, progress)
        hashes = {system: _hashes(work, system) for system in work.systems}
        float_files = work.source.hashes("float")
        temporary = tempfile.TemporaryDirectory(prefix=".diff.", suffix=PARTIAL_SUFFIX, dir=output.path)
        logits = Path(stack.enter_context(temporary))
        reference, record = _reference(options, work, logits, float_files, progress)
        report = _empty_report(options, command, work, record)
        for system in work.systems:
            found = _candidate(work, system, reference, hashes[system], progress)
            report = report.model_copy(update={"candidates": (*report.candidates, found)})
            write_json_model(report, output.diff)
        if options.save_io is not None:
            with progress.task("Writing inputs and outputs", total=None):
                session = graph_session(work.source, "onnx", all_logits=False)
                save_io(session, work.graph, work.course, reference, record.runs, options.save_io)
    return report, output.diff


def _manifest(run: Path) -> Manifest:
    manifest = manifest_of_run(run)
    if is_onnx_model(manifest.options):
        cause = "is the run of an ONNX graph, which has no token ids that are known here"
        raise UserError(str(run), cause, "fptq-export verify DIR compares its outputs")
    return manifest


def _work(options: DiffOptions, manifest: Manifest, workdir: Path, progress: Progress) -> _Work:
    source = source_from_option(options.source, workdir, options.trust_remote_code, progress)
    built = [Path(options.source) / record.path for record in engines_of_run(manifest)]
    engine = options.engine if options.engine is not None else next(iter(built), None)
    systems, left_out = _chosen(options, source, manifest, engine)
    if options.save_io is not None and (problem := source.problem("onnx")) is not None:
        raise UserError("--save-io", problem, "the graph says which inputs there are, and of which type")
    tokenizer = tokenizer_from_checkpoint(source.checkpoint) if needs_tokenizer(options.text) else None
    text = TextOptions(options.text, options.eval_windows, options.eval_seq, options.seed)
    batches = evaluation_batches(text, tokenizer, source.vocab_size)
    course = course_from_windows(batches.tokens, options.decode_steps)
    check_checkpoint(source.checkpoint, progress)
    return _Work(source, manifest, engine, batches, course, tokenizer, systems, left_out)


def _chosen(
    options: DiffOptions, source: Source, manifest: Manifest, engine: Path | None
) -> tuple[tuple[Candidate, ...], dict[Candidate, str]]:
    """The candidates to run, in order, and why others cannot be had. Raises UserError for one that was asked for."""
    problems: dict[Candidate, str] = {}
    for system in CANDIDATES:
        problem = _engine_problem(manifest, engine) if system == "tensorrt" else source.problem(system)
        if problem is not None:
            problems[system] = problem
    if options.systems is None:
        systems = tuple(system for system in CANDIDATES if system not in problems)
        if not systems:
            raise UserError(options.source, "has nothing to compare", "\n".join(problems.values()))
        return systems, problems
    for system in options.systems:
        if system in problems:
            raise UserError(f"--systems {system}", problems[system], "or leave it out")
    return tuple(system for system in CANDIDATES if system in options.systems), {}


def _engine_problem(manifest: Manifest, engine: Path | None) -> str | None:
    """Why an engine cannot be compared, token by token."""
    if manifest.options.logits == "last":
        return "its engine gives logits of the last token only; the onnx column is the same model with all of them"
    return engine_problem(manifest, engine)


def _hashes(work: _Work, system: Candidate) -> dict[str, str]:
    if system != "tensorrt":
        return work.source.hashes(system)
    assert work.engine is not None, "an engine that is chosen is there"
    return {str(work.engine): sha256_from_file(work.engine)}


@contextmanager
def _measured() -> Iterator[_Measured]:
    measured, started = _Measured(), time.monotonic()
    with PeakMemory() as memory:
        yield measured
    measured.seconds, measured.peak_memory_bytes = time.monotonic() - started, memory.bytes


def _reference(
    options: DiffOptions, work: _Work, directory: Path, files: dict[str, str], progress: Progress
) -> tuple[StoredLogits, RunRecord]:
    dtype = _DTYPES[options.reference]
    with _measured() as measured, opened_session(work.source, "float", dtype) as session:
        stored = stored_logits(session, work.course, directory, progress)
        # The context ends with the last reference to the model, so that its memory is free for the next one.
        del session
    runs = f"torch, {options.reference.upper()}"
    return stored, RunRecord(runs=runs, files=files, **vars(measured))


def _candidate(
    work: _Work, system: Candidate, reference: StoredLogits, files: dict[str, str], progress: Progress
) -> CandidateDiff:
    with _measured() as measured, _opened(work, system) as session:
        compared = compared_with(reference, session, work.course, progress)
        del session
    runs = f"TensorRT ({work.engine})" if system == "tensorrt" else RUNS[system]
    return CandidateDiff(
        system=system,
        run=RunRecord(runs=runs, files=files, **vars(measured)),
        prefill=_part(compared.prefill, compared.prefill_psnr),
        decode=_part(compared.decode, compared.decode_psnr),
        greedy=_greedy_figures(reference, compared, work.tokenizer),
    )


def _opened(work: _Work, system: Candidate) -> AbstractContextManager[CausalSession]:
    if system != "tensorrt":
        return opened_session(work.source, system)
    assert work.engine is not None, "an engine that is chosen is there"
    return opened_engine(work.manifest, work.engine)


def _part(totals: LogitTotals, psnr_db: float) -> PartFigures:
    reference, candidate = totals.reference.figures(), totals.candidate.figures()
    return PartFigures(
        reference_perplexity=reference,
        candidate_perplexity=candidate,
        perplexity_increase=candidate.perplexity / reference.perplexity - 1.0,
        logits=totals.logits(),
        top5_agreement=totals.top5_agreement(),
        psnr_db=psnr_db,
    )


def _greedy_figures(
    reference: StoredLogits, compared: Comparison, tokenizer: PreTrainedTokenizerBase | None
) -> GreedyFigures:
    pairs = enumerate(zip(reference.tokens, compared.tokens, strict=True))
    first = next((index for index, (r, c) in pairs if r != c), None)
    texts: list[str | None] = [None, None]
    if first is not None and tokenizer is not None:
        texts = [str(tokenizer.decode(list(tokens[first:]))) for tokens in (reference.tokens, compared.tokens)]
    return GreedyFigures(
        reference_tokens=reference.tokens,
        candidate_tokens=compared.tokens,
        first_divergence=first,
        reference_text=texts[0],
        candidate_text=texts[1],
    )


def _empty_report(options: DiffOptions, command: str, work: _Work, reference: RunRecord) -> DiffReport:
    windows, tokens = work.course.windows.shape
    return DiffReport(
        tool_version=__version__,
        command=command,
        environment=environment(),
        model=work.source.checkpoint.name,
        text=work.batches.description,
        text_sha256=work.batches.sha256,
        windows=windows,
        window_tokens=tokens,
        head_tokens=work.course.head,
        decode_steps=work.course.steps,
        thresholds=options.thresholds(),
        reference=reference,
        candidates=(),
        left_out=work.left_out,
    )
