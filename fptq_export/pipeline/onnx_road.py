"""The stages that differ where MODEL is an ONNX graph; rewrite, build and package are those of every model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptq_export.files import write_json_model
from fptq_export.graph_io import data_path
from fptq_export.observe.data import GraphData, GraphInput, data_from_path, files_from_path, inputs_from_graph
from fptq_export.options import RunOptions
from fptq_export.pipeline.check_options import replays
from fptq_export.pipeline.policy_stage import PolicyInputs, policy_stage
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.stages import Stage, StageRunner
from fptq_export.progress import Progress
from fptq_export.sites import Sites, read_sites
from fptq_export.trace.check_onnx import check_onnx, files_of_onnx, opened_onnx

if TYPE_CHECKING:
    from calib.graph_weights import GraphWeights

__all__ = ["OnnxStages"]


class OnnxStages:
    """Stages of one run. Heavy libraries are imported by the stage that needs them."""

    def __init__(self, options: RunOptions, directory: RunDirectory, runner: StageRunner, progress: Progress) -> None:
        self._options, self._dir, self._runner, self._progress = options, directory, runner, progress
        self._source = Path(options.model)
        self._graph = (directory.model, data_path(directory.model))

    @property
    def stages(self) -> Mapping[str, Callable[[], None]]:
        """By name, those that replace the stages of torch models."""
        return {
            "load": self._load,
            "rotate": lambda: self._runner.skip("rotate"),
            "trace": self._trace,
            "calibrate": self._calibrate,
            "policy": self._policy,
            "verify": self._verify,
            "interchange": lambda: self._runner.skip("interchange"),
        }

    @cached_property
    def _opened(self) -> tuple[tuple[Path, ...], tuple[GraphInput, ...]]:
        """Files and inputs of the user's graph, which is not kept: it may hold its weights."""
        model = opened_onnx(self._source)
        return files_of_onnx(model, self._source), inputs_from_graph(model)

    @property
    def _source_files(self) -> tuple[Path, ...]:
        return self._opened[0]

    @cached_property
    def _calib_data(self) -> GraphData:
        return self._data("--calib-data", self._options.calib_data)

    @cached_property
    def _eval_data(self) -> GraphData:
        if self._options.eval_data is None:
            return self._calib_data
        return self._data("--eval-data", self._options.eval_data)

    def _data(self, option: str, path: Path | None) -> GraphData:
        if path is None:
            raise RuntimeError(f"{option} is missing")
        return data_from_path(path, option, self._opened[1], self._options.batch_size)

    def _data_files(self, *names: str) -> tuple[Path, ...]:
        """Files behind options that are given."""
        given = ((f"--{name.replace('_', '-')}", getattr(self._options, name)) for name in names)
        return tuple(file for option, path in given if path is not None for file in files_from_path(path, option))

    def _parts(self, *names: str) -> dict[str, Any]:
        return self._options.model_dump(mode="json", include=set(names))

    @cached_property
    def _sites(self) -> Sites:
        return read_sites(self._dir.sites)

    def _load(self) -> None:
        from fptq_export.pipeline.engine import check_profile

        def run() -> Mapping[str, Any]:
            check_onnx(self._source)
            if self._options.engine is not None:
                check_profile(self._source, self._options)
            if self._options.calib_data is not None:
                _ = self._calib_data
            if self._options.eval_data is not None:
                _ = self._eval_data
            return {}

        inputs = (*self._source_files, *self._data_files("calib_data", "eval_data"))
        shapes = self._parts("batch_size", "min_shapes", "opt_shapes", "max_shapes")
        self._runner.run(Stage("load", {**shapes, "engine": self._options.engine is not None}, inputs, (), run))

    def _trace(self) -> None:
        from fptq_export.trace.from_onnx import trace_onnx

        def run() -> Mapping[str, Any]:
            trace_onnx(self._source, self._dir.model, self._dir.sites, self._progress)
            return {}

        self._runner.run(Stage("trace", {}, self._source_files, (*self._graph, self._dir.sites), run))

    def _calibrate(self) -> None:
        from fptq_export.pipeline.onnx_calibration import calibrate_onnx

        if replays(self._options):
            self._runner.skip("calibrate")
            return
        hessians = self._hessian_files

        def run() -> Mapping[str, Any]:
            paths = (self._dir.stats, next(iter(hessians), None))
            return calibrate_onnx(self._dir.model, self._sites, self._calib_data, *paths, self._progress)

        inputs = (*self._graph, self._dir.sites, *self._data_files("calib_data"))
        self._runner.run(Stage("calibrate", self._parts("batch_size"), inputs, (self._dir.stats, *hessians), run))

    @property
    def _hessian_files(self) -> tuple[Path, ...]:
        from fptq_export.pipeline.calibration import hessian_files

        return hessian_files(self._options, self._dir, self._runner)

    def _policy(self) -> None:
        inputs = PolicyInputs(
            weights=self._graph,
            tokenizer=(),
            hessians=() if replays(self._options) else self._hessian_files,
            checkpoint=self._weights,
            sites=lambda: self._sites,
        )
        self._runner.run(policy_stage(self._options, self._dir, inputs, self._progress))

    def _weights(self) -> GraphWeights:
        from calib.graph_weights import GraphWeights

        return GraphWeights(self._source.stem, self._dir.model, self._sites)

    def _verify(self) -> None:
        from fptq_export.pipeline.onnx_verification import verify_onnx
        from fptq_export.pipeline.verification import check_gates

        if not self._options.verify:
            self._runner.skip("verify")
            return
        held_out = self._options.eval_data not in (None, self._options.calib_data)

        def run() -> Mapping[str, Any]:
            report = verify_onnx(self._source, self._dir.w4a8, self._eval_data, self._progress, held_out=held_out)
            write_json_model(report, self._dir.verify)
            return {}

        data = self._data_files("eval_data" if self._options.eval_data is not None else "calib_data")
        inputs = (self._dir.w4a8, data_path(self._dir.w4a8), *self._source_files, *data)
        parts = {**self._parts("batch_size"), "held_out": held_out}
        self._runner.run(Stage("verify", parts, inputs, (self._dir.verify,), run))
        check_gates(self._dir.verify, self._options)
