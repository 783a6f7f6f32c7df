"""The models of a run: the one the user gave, and the one that is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fptq_export.options import RunOptions
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.task_options import check_task_options, wanted_task
from fptq_export.pipeline.tokenizer_files import tokenizer_files
from fptq_export.progress import Progress

if TYPE_CHECKING:
    from calib.load import Checkpoint

__all__ = ["RunModels", "rotated_files", "weight_files"]

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
    def given(self) -> Checkpoint:
        """The float model that the user gave; verification compares with it.

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
        return checkpoint

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
        from calib.rotation import check_rotation

        if self._options.rotate:
            check_rotation(self.given)
        dtype = _GRAPH_DTYPES[self._options.dtype]
        check_checkpoint(self.given, self._progress, dtype=dtype, needs_tokenizer=needs_tokenizer)

    @cached_property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files of the given model; a graph has none."""
        return () if is_onnx_model(self._options) else tokenizer_files(self.given.directory)

    def source_files(self) -> tuple[Path, ...]:
        """What the user gave, as files. A GGUF file is not converted for this: that happens when a stage needs it."""
        source = Path(self._options.model)
        if source.suffix == ".gguf" and source.is_file():
            return (source,)
        return (*weight_files(self.given), *self.tokenizer_files)

    def companions(self) -> tuple[Path, ...]:
        """Files beside the weights that a copy of the model needs: tokenizer, and code where it is trusted."""
        code = tuple(sorted(self.given.directory.glob("*.py"))) if self._options.trust_remote_code else ()
        return (*self.tokenizer_files, *code)


def weight_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Config, weights and given INT4 codes of a checkpoint."""
    files = {entry.file for entry in checkpoint.tensors.values()}
    if checkpoint.given is not None:
        files.add(checkpoint.given.path)
    return (checkpoint.directory / "config.json", *sorted(files))


def rotated_files(directory: RunDirectory, companions: tuple[Path, ...]) -> tuple[Path, ...]:
    """What the rotate stage writes."""
    names = ("config.json", "model.safetensors", *(path.name for path in companions))
    return tuple(directory.rotated / name for name in names)
