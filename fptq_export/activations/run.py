"""`fptq-export stats`: run the model on calibration text, part by part, and on held-out text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from calib.auto import can_plot
from calib.batches import CalibrationOptions, TextOptions, TokenBatches, evaluation_batches, token_batches
from calib.checks import check_checkpoint
from calib.documents import needs_tokenizer
from calib.halves import calibrated_model_from_checkpoint
from calib.linears import LinearWeights
from calib.load import Checkpoint, checkpoint_from_model, stored_dtype, tokenizer_from_checkpoint
from calib.observe import observe
from calib.precision import DEFAULT_EXCLUDE, excluded_paths
from calib.stats import Stats
from fptq_export import __version__
from fptq_export.activations.figures import LayerRange, inputs_from_stats
from fptq_export.activations.options import StatsOptions
from fptq_export.activations.plot import plot_inputs
from fptq_export.activations.report import ActivationsReport, Source
from fptq_export.equalized_inputs import EqualizedInputs
from fptq_export.errors import UserError
from fptq_export.files import write_json_model
from fptq_export.numerics import INT8_MAX
from fptq_export.options import RunOptions
from fptq_export.package.manifest import Manifest, read_manifest
from fptq_export.pipeline.environment import environment
from fptq_export.pipeline.models import RunModels
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.speech import hears
from fptq_export.policy import LayerPolicy, Policy, PolicyArrays, arrays_path, read_policy
from fptq_export.progress import Progress, Task
from fptq_export.sites import read_sites
from fptq_export.tasks import gives_hidden_states

__all__ = ["run_stats"]


@dataclass(frozen=True)
class _Titled:
    """Progress under a title of its own."""

    progress: Progress
    title: str

    def task(self, _description: str, total: float | None, unit: str = "") -> AbstractContextManager[Task]:
        return self.progress.task(self.title, total, unit)


@dataclass(frozen=True)
class _Opened:
    """A model, and what is known of its inputs already."""

    checkpoint: Checkpoint
    options: RunOptions | None
    """Of the run; None for a model alone."""
    linears: tuple[str, ...]
    policy: Policy | None
    directory: RunDirectory | None


def run_stats(options: StatsOptions, command: str, progress: Progress) -> tuple[ActivationsReport, Path, Path | None]:
    """Measure the inputs of the linears that are, or would be, quantized.

    Args:
        options: What to run.
        command: The command line, for the report.
        progress: Where long work reports.

    Returns:
        The report, its file, and the picture where one was drawn.

    Raises:
        UserError: Anything the user can mend.
    """
    manifest = read_manifest(Path(options.source))
    output = RunDirectory(_output(options, manifest))
    with output.locked():
        opened = _opened_run(options, manifest, progress) if manifest else _opened_model(options, output, progress)
        if options.layer is not None:
            _check_pattern(options.layer, opened.linears)
        calibration, held_out = _batches(options, opened)
        parts = [
            _observed(opened, batches, _Titled(progress, f"calibration text, part {number} of {options.parts}"))
            for number, batches in enumerate(_parts(calibration, options.parts), start=1)
        ]
        seen = _observed(opened, held_out, _Titled(progress, "held-out text"))
        rule = opened.policy.rule if opened.policy is not None else None
        thresholds = (rule.v0, rule.v1) if rule is not None else _paper_thresholds()
        report = ActivationsReport(
            tool_version=__version__,
            command=command,
            environment=environment(),
            model=opened.checkpoint.name,
            v0=thresholds[0],
            v1=thresholds[1],
            max_range_ratio=options.max_range_ratio,
            calibration=_source(calibration),
            held_out=_source(held_out),
            inputs=inputs_from_stats(parts, seen, _ranges(opened, parts, thresholds[0]), options.max_range_ratio),
        )
        write_json_model(report, output.activations)
        drawn = output.activations_plot if options.plot and can_plot() else None
        if drawn is not None:
            plot_inputs(report, drawn)
    return report, output.activations, drawn


def _output(options: StatsOptions, manifest: Manifest | None) -> Path:
    if options.output is not None:
        return options.output
    return Path(options.source) if manifest is not None else Path(f"{Path(options.source).stem}-stats")


def _opened_run(options: StatsOptions, manifest: Manifest, progress: Progress) -> _Opened:
    directory, ran = RunDirectory(Path(options.source)), manifest.options
    if is_onnx_model(ran):
        cause = "is the run of an ONNX graph, whose activations torch cannot run"
        raise UserError(options.source, cause, "give the run of a Hugging Face model")
    policy = read_policy(directory.policy)
    checkpoint = RunModels(ran, directory, progress).quantized
    if hears(checkpoint.config):
        cause = "is the run of a model that reads mel features, and this runs text through it"
        raise UserError(options.source, cause, "fptq-export verify DIR compares it with the FP32 model")
    measured = tuple(path for path, layer in policy.layers.items() if layer.input_absmax is not None)
    return _Opened(checkpoint, ran, measured, policy, directory)


def _opened_model(options: StatsOptions, output: RunDirectory, progress: Progress) -> _Opened:
    trust = options.trust_remote_code
    checkpoint = checkpoint_from_model(options.source, workdir=output.path, trust_remote_code=trust, progress=progress)
    check_checkpoint(checkpoint, progress)
    paths = tuple(LinearWeights.from_checkpoint(checkpoint).shapes)
    excluded = excluded_paths(paths, DEFAULT_EXCLUDE)
    return _Opened(checkpoint, None, tuple(path for path in paths if path not in excluded), None, None)


def _check_pattern(pattern: str, linears: Sequence[str]) -> None:
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"--layer {pattern!r}", f"not a regular expression ({error})", "escape it") from None
    if not any(search(path) for path in linears):
        raise UserError(f"--layer {pattern!r}", "matches no layer that is measured", f"layers look like {linears[0]}")


def _batches(options: StatsOptions, opened: _Opened) -> tuple[TokenBatches, TokenBatches]:
    """Calibration and held-out text; of the run, where the user names no other."""
    ran = opened.options
    known = CalibrationOptions() if ran is None else CalibrationOptions(
        ran.calib_dataset, ran.calib_size, ran.calib_seq, seed=ran.seed
    )  # fmt: skip
    given = {
        name: value
        for name, value in (
            ("dataset", options.calib_dataset),
            ("size", options.calib_size),
            ("seq", options.calib_seq),
            ("seed", options.seed if ran is None else None),
        )
        if value is not None
    }
    wanted = replace(known, **given)  # type: ignore[arg-type] # the options have the types of the fields
    text = TextOptions(options.text, options.eval_windows, options.eval_seq, wanted.seed)
    reads_text = needs_tokenizer(wanted.dataset) or needs_tokenizer(text.source)
    tokenizer = tokenizer_from_checkpoint(opened.checkpoint) if reads_text else None
    vocab_size = opened.checkpoint.config.get_text_config().vocab_size
    encoder = gives_hidden_states(opened.checkpoint.task)
    return (
        token_batches(wanted, tokenizer, vocab_size, encoder=encoder),
        evaluation_batches(text, tokenizer, vocab_size, encoder=encoder),
    )


def _parts(batches: TokenBatches, count: int) -> list[TokenBatches]:
    """The windows in parts of about the same size, in order.

    Raises:
        UserError: There are fewer windows than parts.
    """
    if len(batches.tokens) < count:
        cause = f"is {count}, and there are {len(batches.tokens)} calibration windows"
        raise UserError("--parts", cause, "give fewer parts or more --calib-size")
    return [replace(batches, tokens=np.ascontiguousarray(tokens)) for tokens in np.array_split(batches.tokens, count)]


def _observed(opened: _Opened, batches: TokenBatches, progress: Progress) -> Stats:
    load = partial(calibrated_model_from_checkpoint, opened.checkpoint, stored_dtype(opened.checkpoint))
    return observe(load, batches, opened.linears, progress, histograms=True)


def _source(batches: TokenBatches) -> Source:
    return Source(description=batches.description, sha256=batches.sha256, tokens=batches.count)


def _paper_thresholds() -> tuple[float, float]:
    return RunOptions.model_fields["v0"].default, RunOptions.model_fields["v1"].default


def _ranges(opened: _Opened, parts: Sequence[Stats], v0: float) -> Mapping[str, LayerRange]:
    """What the policy does with each input. Of a model alone, what is certain: below v0 its range is static."""
    if opened.policy is None or opened.directory is None:
        absmax = {path: max(part.absmax(path) for part in parts) for path in opened.linears}
        return {path: LayerRange("static", v) if 0.0 < v <= v0 else LayerRange(None) for path, v in absmax.items()}
    arrays = PolicyArrays(arrays_path(opened.directory.policy))
    inputs = EqualizedInputs(opened.policy, arrays, read_sites(opened.directory.sites))
    clips = opened.options is not None and opened.options.range_calibrator != "absmax"
    return {
        path: LayerRange(layer.activation, _static_range(layer), inputs.scales(path), clips)
        for path, layer in opened.policy.layers.items()
        if path in opened.linears
    }


def _static_range(layer: LayerPolicy) -> float | None:
    return None if layer.activation_scale is None else INT8_MAX * layer.activation_scale
