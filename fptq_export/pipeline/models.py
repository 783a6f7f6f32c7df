"""The models of a run: the one the user gave, with its adapter, and the one that is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fptq_export.options import RunOptions
from fptq_export.package.manifest import manifest_of_run
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.speech import check_data, check_data_options, data_files
from fptq_export.pipeline.stages import Stage
from fptq_export.pipeline.task_options import check_task_options, wanted_task
from fptq_export.pipeline.tokenizer_files import tokenizer_files
from fptq_export.progress import Progress

if TYPE_CHECKING:
    from calib.load import Checkpoint
    from calib.lora import Adapter

__all__ = ["RunModels", "merge_stage", "models_of_run", "rotate_stage", "weight_files"]

_GRAPH_DTYPES: Mapping[str, Literal["float16", "bfloat16", "float32"]] = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}


class RunModels:
    """Checkpoints, opened when they are first asked for."""

    def __init__(self, options: RunOptions, directory: RunDirectory, progress: Progress) -> None:
        self._options = options
        self._dir = directory
        self._progress = progress

    @cached_property
    def adapter(self) -> Adapter | None:
        """What is merged into the model that the user gave; None where nothing is.

        Raises:
            UserError: It cannot be opened, or is not of the kind that is merged.
        """
        from calib.lora import adapter_from_directory

        return None if self._options.adapter is None else adapter_from_directory(self._options.adapter)

    @cached_property
    def base(self) -> Checkpoint:
        """The float model that the user gave.

        Raises:
            UserError: It cannot be opened, or an option means nothing for its kind of model.
        """
        from calib.load import checkpoint_from_model

        checkpoint = checkpoint_from_model(
            self._options.model,
            workdir=self._dir.path,
            trust_remote_code=self._options.trust_remote_code,
            progress=self._progress,
            task=wanted_task(self._options),
        )
        check_task_options(self._options, checkpoint.task)
        check_data_options(self._options, checkpoint.config)
        return checkpoint

    @cached_property
    def given(self) -> Checkpoint:
        """The float model that is exported, its adapter merged; verification compares with it."""
        from calib.load import checkpoint_from_directory

        if self._options.adapter is None:
            return self.base
        trust, base = self._options.trust_remote_code, self.base
        return checkpoint_from_directory(self._dir.merged, base.name, trust_remote_code=trust, task=base.task)

    @cached_property
    def quantized(self) -> Checkpoint:
        """The float model that is traced and quantized: the rotated one with `--rotate`, else the given one."""
        from calib.load import checkpoint_from_directory

        if not self._options.rotate:
            return self.given
        trust = self._options.trust_remote_code
        return checkpoint_from_directory(self._dir.rotated, self.given.name, trust_remote_code=trust)

    def check(self, *, needs_tokenizer: bool) -> None:
        """Refuse a given model that a later stage would stumble over, rotation first: it reads no weight.

        Raises:
            UserError: Says what and why.
        """
        from calib.checks import check_checkpoint
        from calib.lora import check_merge
        from calib.rotation import check_rotation

        if self._options.rotate:
            check_rotation(self.base)
        if self.adapter is not None:
            check_merge(self.base, self.adapter)
        self.check_data()
        dtype = _GRAPH_DTYPES[self._options.dtype]
        check_checkpoint(self.base, self._progress, dtype=dtype, needs_tokenizer=needs_tokenizer)

    def check_data(self) -> None:
        """Refuse features that the given model does not take; a model of text has none.

        Raises:
            UserErrors: All that is wrong with them.
        """
        check_data(self.base, self._options)

    @cached_property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files of the given model; a graph has none."""
        return () if is_onnx_model(self._options) else tokenizer_files(self.base.directory)

    def source_files(self) -> tuple[Path, ...]:
        """What the user gave, as files. A GGUF file is not converted for this: that happens when a stage needs it."""
        adapter = () if self.adapter is None else self.adapter.files
        source = Path(self._options.model)
        if source.suffix == ".gguf" and source.is_file():
            return (source, *adapter)
        return (
            *weight_files(self.base),
            *self.tokenizer_files,
            *adapter,
            *data_files(self._options, "calib_data", "eval_data"),
        )

    def companions(self) -> tuple[Path, ...]:
        """Files beside the weights that a copy of the model needs: tokenizer, and code where it is trusted."""
        code = tuple(sorted(self.base.directory.glob("*.py"))) if self._options.trust_remote_code else ()
        return (*self.tokenizer_files, *code)


def models_of_run(directory: RunDirectory, progress: Progress) -> RunModels:
    """The models of a run that was made before.

    Raises:
        UserError: There is none in the directory.
    """
    return RunModels(manifest_of_run(directory.path).options, directory, progress)


def weight_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Config, weights and given INT4 codes of a checkpoint."""
    files = {entry.file for entry in checkpoint.tensors.values()}
    if checkpoint.given is not None:
        files.add(checkpoint.given.path)
    return (checkpoint.directory / "config.json", *sorted(files))


def merge_stage(models: RunModels, adapter: Adapter, directory: RunDirectory, progress: Progress) -> Stage:
    """Merge an adapter into the model that the user gave."""
    from calib.lora import write_merged

    copies = models.companions()
    return Stage(
        "merge",
        {},
        (*weight_files(models.base), *adapter.files, *copies),
        _model_files(directory.merged, copies),
        lambda: write_merged(models.base, adapter, directory.merged, copies, progress),
    )


def rotate_stage(models: RunModels, directory: RunDirectory, progress: Progress) -> Stage:
    """Rotate the residual stream of the model, its adapter merged."""
    from calib.rotation import write_rotated

    given, copies = models.given, models.companions()
    return Stage(
        "rotate",
        {},
        (*weight_files(given), *copies),
        _model_files(directory.rotated, copies),
        lambda: write_rotated(given, directory.rotated, copies, progress),
    )


def _model_files(directory: Path, companions: tuple[Path, ...]) -> tuple[Path, ...]:
    names = ("config.json", "model.safetensors", *(path.name for path in companions))
    return tuple(directory / name for name in names)
