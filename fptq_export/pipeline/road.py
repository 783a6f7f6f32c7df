"""The one-way road, and the only module that knows its order.

load -> merge -> rotate -> trace -> calibrate -> policy -> rewrite -> verify -> interchange -> build -> package
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from calib.documents import needs_tokenizer
from calib.ranks import ALONE, Ranks
from fptq_export import __version__
from fptq_export.build.targets import module_name, target_from_option
from fptq_export.files import remove_partial_files, write_json_model
from fptq_export.graph_io import data_path
from fptq_export.options import RunOptions
from fptq_export.package.manifest import Manifest, read_manifest, write_manifest
from fptq_export.pipeline.check_options import check_options, replays
from fptq_export.pipeline.environment import environment, library_versions
from fptq_export.pipeline.models import RunModels, merge_stage, rotate_stage, weight_files
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.onnx_road import OnnxStages
from fptq_export.pipeline.plugin import plugin_libraries
from fptq_export.pipeline.policy_stage import PolicyInputs, policy_stage
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.speech import check_processes, data_files, evaluation_option, hears
from fptq_export.pipeline.stages import Stage, StageRunner
from fptq_export.pipeline.trace_stage import trace_stage
from fptq_export.policy import PolicyArrays, arrays_path, read_policy
from fptq_export.progress import Progress
from fptq_export.sites import Sites, read_sites
from fptq_export.tasks import SEQ2SEQ_DECODER, VLM_DECODER, gives_hidden_states

if TYPE_CHECKING:
    from calib.load import Checkpoint
    from fptq_export.rewrite import GraphForm
    from fptq_export.verify.encoder_report import EncoderReport
    from fptq_export.verify.report import VerifyReport

__all__ = ["ROAD", "VERBS", "run_road"]

_MODEL = ("load", "merge", "rotate")
ROAD = (*_MODEL, "trace", "calibrate", "policy", "rewrite", "verify", "interchange", "build", "package")
VERBS: Mapping[str, tuple[str, ...]] = {
    "run": ROAD,
    "trace": (*_MODEL, "trace"),
    "calibrate": (*_MODEL, "calibrate", "policy"),
    "rewrite": ("rewrite",),
    "verify": ("verify",),
    "checkpoint": ("interchange",),
    "build": ("build",),
}
"""Stages each verb runs; a verb needs the files of the stages before its own."""


def run_road(
    verb: str, options: RunOptions, command: str, console: Console, progress: Progress, ranks: Ranks = ALONE
) -> Manifest:
    """Run the stages of a verb, skipping those whose result is already there.

    Args:
        verb: A key of `VERBS`.
        options: What to do.
        command: The command line, for the manifest.
        console: Where stages report.
        progress: Where long work reports.
        ranks: Processes that calibrate together, of which this is the first.

    Returns:
        The manifest of the run directory.

    Raises:
        UserError: Anything the user can mend.
        GateError: The quantized model is less accurate than allowed; no engine was built.
        PrecisionError: A graph or engine does not run what the policy says.
    """
    directory = RunDirectory(options.output)
    with directory.locked():
        remove_partial_files(directory.path)
        runner = StageRunner(directory.path, _manifest(options, command), console)
        write_manifest(runner.manifest, directory.path)
        road = _Road(options, VERBS[verb], directory, runner, progress, ranks)
        check_options(options, road.target, VERBS[verb], ranks)
        for name in VERBS[verb]:
            road.stages[name]()
    return runner.manifest


def _manifest(options: RunOptions, command: str) -> Manifest:
    known = read_manifest(options.output)
    return Manifest(
        tool_version=__version__,
        command=command,
        options=options,
        environment=environment(),
        stages=known.stages if known is not None else {},
    )


class _Road:
    """The stages of one run. Heavy libraries are imported by the stage that needs them."""

    def __init__(
        self,
        options: RunOptions,
        names: tuple[str, ...],
        directory: RunDirectory,
        runner: StageRunner,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self._options, self._names, self._dir, self._runner = options, names, directory, runner
        self._progress, self._ranks = progress, ranks
        self._models = RunModels(options, directory, progress)
        self.target = target_from_option(options.target)
        self.stages: Mapping[str, Callable[[], None]] = {name: getattr(self, f"_{name}") for name in ROAD}
        if is_onnx_model(options):
            self.stages = {**self.stages, **OnnxStages(options, directory, runner, progress).stages}

    @property
    def _replays(self) -> bool:
        return replays(self._options)

    @property
    def _checkpoint(self) -> Checkpoint:
        return self._models.quantized

    @cached_property
    def _weight_files(self) -> tuple[Path, ...]:
        return weight_files(self._checkpoint)

    @property
    def _tokenizer_files(self) -> tuple[Path, ...]:
        return self._models.tokenizer_files

    @cached_property
    def _sites(self) -> Sites:
        return read_sites(self._dir.sites)

    def _stage(
        self,
        name: str,
        parts: Mapping[str, Any],
        inputs: tuple[Path, ...],
        outputs: tuple[Path, ...],
        run: Callable[[], Mapping[str, Any] | None],
    ) -> None:
        self._runner.run(Stage(name, parts, inputs, outputs, lambda: run() or {}))

    def _option_parts(self, *names: str) -> dict[str, Any]:
        return self._options.model_dump(mode="json", include=set(names))

    def _load(self) -> None:
        check_processes(self._models.base.config, self._ranks.size)
        needs_text = not hears(self._models.base.config) and self._reads_text()
        parts = {**self._option_parts("dtype", "rotate", "adapter"), "needs_text": needs_text}
        inputs = self._models.source_files()
        self._stage("load", parts, inputs, (), lambda: self._models.check(needs_tokenizer=needs_text))

    def _reads_text(self) -> bool:
        options = self._options
        verifies = "verify" in self._names and options.verify and needs_tokenizer(options.eval_text)
        calibrates = "calibrate" in self._names and not self._replays and needs_tokenizer(options.calib_dataset)
        return verifies or calibrates

    def _merge(self) -> None:
        adapter = self._models.adapter
        if adapter is None:
            self._runner.skip("merge")
        else:
            self._runner.run(merge_stage(self._models, adapter, self._dir, self._progress))

    def _rotate(self) -> None:
        if self._options.rotate:
            self._runner.run(rotate_stage(self._models, self._dir, self._progress))
        else:
            self._runner.skip("rotate")

    def _trace(self) -> None:
        from fptq_export.rewrite import check_form

        work = (self._options, self._dir, self._progress)
        self._runner.run(trace_stage(self._checkpoint, self._weight_files, *work))
        if self._dir.model.is_file():  # an earlier run that ended well may have removed it
            check_form(self._dir.model, self._form)

    @property
    def _form(self) -> GraphForm:
        from fptq_export.rewrite import GraphForm

        return GraphForm(self._options.logits, self._options.kv_cache, self._options.kv_dtype)

    def _calibrate(self) -> None:
        from fptq_export.pipeline.calibration import calibrate, measured_parts

        if self._replays:
            self._runner.skip("calibrate")
            return
        texts = tuple(path for path in (Path(self._options.calib_dataset),) if path.is_file())
        files = (*texts, *data_files(self._options, "calib_data"))
        hessians = next(iter(self._hessian_files), None)

        def run() -> Mapping[str, Any]:
            key = self._runner.running_key
            return calibrate(self._checkpoint, self._sites, self._options, hessians, key, self._ranks, self._progress)

        parts = self._option_parts("calib_dataset", "calib_size", "calib_seq", "batch_size", "seed", "exclude")
        self._stage(
            "calibrate",
            {**parts, **measured_parts(self._sites, self._options), "python": platform.python_version()},
            (self._dir.sites, *files, *self._weight_files, *self._tokenizer_files),
            (self._dir.stats, *self._hessian_files),
            run,
        )

    @property
    def _hessian_files(self) -> tuple[Path, ...]:
        from fptq_export.pipeline.calibration import hessian_files

        return hessian_files(self._options, self._dir, self._runner)

    def _policy(self) -> None:
        inputs = PolicyInputs(
            weights=self._weight_files,
            tokenizer=self._tokenizer_files,
            hessians=() if self._replays else self._hessian_files,
            checkpoint=lambda: self._checkpoint,
            sites=lambda: self._sites,
        )
        self._runner.run(policy_stage(self._options, self._dir, inputs, self._progress))

    def _rewrite(self) -> None:
        from fptq_export.rewrite import RewritePaths, rewrite

        ranges = (self._dir.range_outputs,) if self._options.emit_range_outputs else ()
        paths = RewritePaths(self._dir.model, self._dir.qdq, self._dir.w4a8, *ranges)

        def run() -> Mapping[str, Any]:
            self._dir.range_outputs.unlink(missing_ok=True)  # of an earlier run, which had the output
            arrays = PolicyArrays(arrays_path(self._dir.policy))
            return rewrite(paths, self._sites, read_policy(self._dir.policy), arrays, self._progress, self._form)

        inputs = (self._dir.model, data_path(self._dir.model), self._dir.sites)
        policy = (self._dir.policy, arrays_path(self._dir.policy))
        outputs = (self._dir.qdq, self._dir.w4a8, data_path(self._dir.w4a8), *ranges)
        self._stage("rewrite", self._option_parts("logits", "kv_cache", "kv_dtype"), (*inputs, *policy), outputs, run)

    def _verify(self) -> None:
        from fptq_export.pipeline.verification import check_gates

        if not self._options.verify:
            self._runner.skip("verify")
            return
        task = self._models.given.task
        encoder = gives_hidden_states(task)
        parts = ("eval_text", "eval_sentences", "seed") if encoder else ("eval_windows", "decode_steps")
        files = (self._dir.w4a8, data_path(self._dir.w4a8), *weight_files(self._models.given), *self._tokenizer_files)
        texts = tuple(path for path in (Path(self._options.eval_text),) if encoder and path.is_file())
        texts = (*texts, *data_files(self._options, evaluation_option(self._options)))
        embeddings = (self._dir.embeddings,) if task == VLM_DECODER else ()
        self._stage(
            "verify",
            {**self._option_parts("eval_seq", *parts), "python": platform.python_version()},
            (*files, *texts, *embeddings),
            (self._dir.verify,),
            lambda: write_json_model(self._report(), self._dir.verify),
        )
        check_gates(self._dir.verify, self._options)

    def _report(self) -> VerifyReport | EncoderReport:
        from fptq_export.pipeline.decoder_verification import verify_decoder
        from fptq_export.pipeline.encoder_verification import verify_encoder
        from fptq_export.pipeline.speech_verification import verify_speech
        from fptq_export.pipeline.verification import verify

        given, w4a8, work = self._models.given, self._dir.w4a8, (self._options, self._progress)
        if hears(given.config):
            return verify_speech(given, w4a8, *work)
        if gives_hidden_states(given.task):
            return verify_encoder(given, w4a8, self._sites, *work)
        if given.task == SEQ2SEQ_DECODER:
            return verify_decoder(given, w4a8, *work)
        return verify(given, w4a8, *work, embeddings=self._dir.embeddings if given.task == VLM_DECODER else None)

    def _interchange(self) -> None:
        from fptq_export.pipeline.checkpoint import write_run_as_checkpoint

        target = self._options.checkpoint
        if target is None:
            self._runner.skip("interchange")
            return
        policy = (self._dir.policy, arrays_path(self._dir.policy))
        copies = {path: target / path.name for path in self._tokenizer_files}
        self._stage(
            "interchange",
            self._option_parts("dtype", "checkpoint_format", "checkpoint_per_token"),
            (*policy, self._dir.sites, *self._weight_files, *copies),
            (target / "model.safetensors", target / "config.json", *copies.values()),
            lambda: write_run_as_checkpoint(self._checkpoint, self._sites, self._dir, self._options, copies),
        )

    def _build(self) -> None:
        from fptq_export.pipeline.engine import build

        if self._options.engine is None:
            self._runner.skip("build")
            return
        engine = self._options.engine
        library = module_name(self.target)
        parts = self._option_parts(
            "max_batch_size",
            "max_input_len",
            "max_kv_len",
            "min_shapes",
            "opt_shapes",
            "max_shapes",
            "compute_capability",
            "builder_optimization_level",
            "mem_pool_size",
            "plugin",
            "embed_plugin",
            "fuse_projections",
        )
        plugin = plugin_libraries(self._options, self.target)
        self._stage(
            "build",
            {**parts, "target": str(self.target), "library": library_versions().get(library or "")},
            (self._dir.w4a8, data_path(self._dir.w4a8), self._dir.policy, self._dir.sites, *plugin),
            (engine, self._dir.build_log, self._dir.proof),
            lambda: build(self._dir, engine, self.target, self._options, self._progress),
        )

    def _package(self) -> None:
        copies = {path: self._dir.path / path.name for path in self._tokenizer_files}

        def run() -> None:
            for source, target in copies.items():
                shutil.copyfile(source, target)

        self._stage("package", {}, tuple(copies), tuple(copies.values()), run)
        if not self._options.keep:
            self._runner.remove_outputs("trace", (self._dir.model, data_path(self._dir.model)))
            self._runner.remove_outputs("rewrite", (self._dir.qdq,))
