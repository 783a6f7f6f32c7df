"""`fptq-export debug`: walk through the blocks of float model and graph side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from rich.console import Console

from calib.checks import check_checkpoint
from calib.equalize import LinearScales
from fptq_export import __version__
from fptq_export.debug.cut import CutFiles, write_cut
from fptq_export.debug.judge import LayerRun, judged
from fptq_export.debug.leave_one_out import Prediction, Variants, gain, log_probabilities, prediction
from fptq_export.debug.opened import OpenedRun, open_run
from fptq_export.debug.options import DebugOptions
from fptq_export.debug.reference import FloatLinear, FloatModel
from fptq_export.debug.report import DebugReport, LayerReport
from fptq_export.debug.segments import Segment, segments_of_graph
from fptq_export.debug.sessions import Probe, SegmentSessions
from fptq_export.debug.weight_faults import FloatWeight, policy_faults
from fptq_export.errors import UserError
from fptq_export.files import write_json_model
from fptq_export.memory import PeakMemory
from fptq_export.pipeline.environment import environment
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.progress import Progress, Task

__all__ = ["run_cut", "run_debug"]


@dataclass(frozen=True)
class _Step:
    """One segment of the graph, and the same part of the float model."""

    segment: Segment
    linears: dict[str, FloatLinear]
    """Its quantized linears that ran."""
    hidden: NDArray[np.float32] | None
    """The float model's hidden states before it; None before the first block."""
    logits: NDArray[np.float32] | None
    """The float model's, behind the last block."""


def run_debug(options: DebugOptions, command: str, console: Console, progress: Progress) -> tuple[DebugReport, Path]:
    """Measure every quantized linear of a run.

    Args:
        options: What to measure, and on what.
        command: The command line, for the report.
        console: Where files that were changed are named.
        progress: Where long work reports.

    Returns:
        The report and the file it lies in.

    Raises:
        UserError: Anything the user can mend.
    """
    started = time.monotonic()
    output = RunDirectory(options.output or options.source)
    with output.locked(), PeakMemory() as memory:
        run = open_run(options, progress)
        for name in run.changed_files:
            console.print(f"{name} is not what the run wrote: it was changed since", markup=False)
        check_checkpoint(run.checkpoint, progress)
        walk = _Walk(run, options)
        with progress.task("debug", walk.work, unit="layers") as task:
            for step in walk.steps():
                walk.measure(step, task)
        report = walk.report(command, time.monotonic() - started, memory.bytes)
        write_json_model(report, output.debug)
    return report, output.debug


def run_cut(options: DebugOptions, progress: Progress) -> CutFiles:
    """Write one layer as a graph of its own, with what it reads in the run's graph and what the float layer answers.

    Raises:
        UserError: There is no such quantized layer, or no token reaches it, or anything else the user can mend.
    """
    path = options.cut or ""
    run = open_run(options, progress)
    if path not in run.linears:
        close = ", ".join([name for name in run.linears if name.endswith(path.rpartition(".")[2])][:3])
        cause = f"--cut {path}", "is no quantized layer of the run"
        raise UserError(*cause, f"give a path of policy.json, such as {close or next(iter(run.linears))}")
    check_checkpoint(run.checkpoint, progress)
    walk = _Walk(run, options)
    with progress.task(f"running up to {path}", total=None, unit="segments") as task:
        for step in walk.steps():
            sessions = walk.sessions(step)
            if path in {linear.path for linear in step.segment.linears}:
                x = walk.probe(sessions).x[path]
                target = RunDirectory(options.output or options.source).path / "cut" / path
                return write_cut(run.graph, run.linears[path], x, walk.folded(path, step).wanted, target)
            walk.advance(sessions)
            task.advance()
    raise RuntimeError(f"{path} is in no segment")


class _Walk:
    """Where graph and float model are in their blocks, and what was found so far."""

    def __init__(self, run: OpenedRun, options: DebugOptions) -> None:
        self._run, self._options = run, options
        self._tokens = run.batches.tokens
        self._float = FloatModel(run.checkpoint, self._tokens)
        self._segments = segments_of_graph(run.graph, run.sites, run.linears, self._float.blocks, self._float.count)
        self._hidden: NDArray[Any] | None = None
        self._layers: dict[str, LayerReport] = {}
        self._variants = Variants(self._tokens)
        self._float_prediction: Prediction | None = None
        self._graph_prediction: Prediction | None = None

    @property
    def work(self) -> int:
        """What a progress bar counts: each layer, and each again where it is left out."""
        return len(self._run.linears) * (2 if self._options.leave_one_out else 1)

    def steps(self) -> Iterator[_Step]:
        """Every segment, beside the float model at the same place."""
        first, *blocks, rest = self._segments
        yield self._outside(first, logits=False)
        for index, segment in enumerate(blocks):
            hidden = self._float.hidden()
            linears = self._float.pass_block(index, tuple(linear.path for linear in segment.linears))
            yield _Step(segment, linears, hidden, None)
        yield self._outside(rest, logits=True)

    def _outside(self, segment: Segment, *, logits: bool) -> _Step:
        if not (segment.linears or logits):
            return _Step(segment, {}, None, None)
        hidden = self._float.hidden() if logits else None
        linears, found = self._float.outside(tuple(linear.path for linear in segment.linears))
        return _Step(segment, linears, hidden, found if logits else None)

    def folded(self, path: str, step: _Step) -> FloatWeight:
        """The float weight of a linear with its fold scales."""
        return FloatWeight.folded(step.linears[path].weight, self._run.folded.get(path, LinearScales()))

    def sessions(self, step: _Step) -> SegmentSessions:
        """The segment of the graph, ready to run."""
        weights = {path: self.folded(path, step).wanted for path in step.linears}
        return SegmentSessions(self._run.directory.w4a8, self._run.graph, step.segment, weights)

    def probe(self, sessions: SegmentSessions) -> Probe:
        """The segment on the graph's own hidden states."""
        return sessions.probe(self._tokens, self._hidden)

    def advance(self, sessions: SegmentSessions) -> None:
        """Pass a segment without looking."""
        self._hidden = sessions.run(self._tokens, self._hidden)

    def measure(self, step: _Step, task: Task) -> None:
        """Measure the layers of a segment, and pass it."""
        sessions = self.sessions(step)
        if self._options.leave_one_out and step.logits is None:
            self._variants.pass_segment(sessions)
        probe = self.probe(sessions)
        if step.segment.linears:
            self._judge(step, sessions, probe, task)
        if step.logits is not None:
            self._predict(step, step.logits, sessions, probe, task)
        elif self._options.leave_one_out:
            for path in step.linears:
                self._variants.add(path, sessions.probe(self._tokens, self._hidden, {path}).end)
        self._hidden = probe.end

    def _judge(self, step: _Step, sessions: SegmentSessions, probe: Probe, task: Task) -> None:
        hidden = None if step.hidden is None else self._as_start(step.segment, step.hidden)
        clean = sessions.probe(self._tokens, hidden, step.linears.keys())
        inputs = {path: self._run.in_graph_scale(path, found.x) for path, found in step.linears.items()}
        alone = sessions.alone({path: x for path, x in inputs.items() if len(x) and np.isfinite(x).all()})
        wrong: ir.Value | None = None
        for linear in step.segment.linears:
            path, weight = linear.path, linear.weight()
            layer_run = LayerRun(
                linear=linear,
                reference=step.linears[path],
                folded=self.folded(path, step),
                alone=alone.get(path),
                x=probe.x[path],
                y=probe.y[path],
                clean_x=clean.x[path],
                calibrated_absmax=self._run.inputs.absmax(path),
                site=self._run.inputs.site(path),
            )
            judge_input = wrong in (None, linear.x)
            report = judged(layer_run, weight, step.segment.block, self._options.max_excess, judge_input=judge_input)
            wrong = linear.x if report.input_is_wrong else wrong
            faults = (*policy_faults(linear, weight, self._run.arrays), *report.faults)
            self._layers[path] = report.model_copy(update={"faults": faults})
            task.advance()

    def _as_start(self, segment: Segment, hidden: NDArray[np.float32]) -> NDArray[Any]:
        """The float model's hidden states in the type of the graph's."""
        assert segment.start is not None, "hidden states are given to segments that read them"
        assert segment.start.dtype is not None, "and these have a type"
        with np.errstate(over="ignore"):
            return hidden.astype(segment.start.dtype.numpy())

    def _predict(
        self, step: _Step, logits: NDArray[np.float32], sessions: SegmentSessions, probe: Probe, task: Task
    ) -> None:
        """Compare the logits of the graph, and of each variant, with the float model's."""
        wanted = log_probabilities(logits)
        self._float_prediction = prediction(wanted, self._tokens, wanted)
        self._graph_prediction = prediction(log_probabilities(probe.end), self._tokens, wanted)
        if not self._options.leave_one_out:
            return
        for path in step.linears:
            self._leave_out(path, sessions.probe(self._tokens, self._hidden, {path}).end, wanted, task)
        for path, found in self._variants.logits(sessions):
            self._leave_out(path, found, wanted, task)

    def _leave_out(self, path: str, logits: NDArray[Any], wanted: torch.Tensor, task: Task) -> None:
        assert self._graph_prediction is not None
        found = gain(self._graph_prediction, prediction(log_probabilities(logits), self._tokens, wanted))
        self._layers[path] = self._layers[path].model_copy(update={"leave_one_out": found})
        task.advance()

    def report(self, command: str, seconds: float, peak_memory_bytes: int) -> DebugReport:
        """Everything, once the last segment was measured."""
        assert self._float_prediction is not None
        assert self._graph_prediction is not None
        float_perplexity = self._float_prediction.perplexity()
        if float_perplexity is None:
            raise UserError(self._run.checkpoint.name, "gives logits that are not finite", "check its weights")
        batches = self._run.batches
        return DebugReport(
            tool_version=__version__,
            command=command,
            environment=environment(),
            model=self._run.checkpoint.name,
            text=batches.description,
            text_sha256=batches.sha256,
            windows=len(batches.tokens),
            window_tokens=batches.tokens.shape[1],
            max_excess_db=self._options.max_excess,
            changed_files=self._run.changed_files,
            float_perplexity=float_perplexity,
            graph_perplexity=self._graph_prediction.perplexity(),
            graph_kl=self._graph_prediction.mean_kl(),
            layers=self._layers,
            bad_layers=tuple(path for path, layer in self._layers.items() if layer.faults),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes,
        )
