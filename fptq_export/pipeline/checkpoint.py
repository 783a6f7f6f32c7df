"""The compressed-tensors checkpoint of a run: the way from the pipeline's options to `calib.interchange`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.policy import PolicyArrays, arrays_path, read_policy
from fptq_export.sites import Sites

if TYPE_CHECKING:
    from calib.load import Checkpoint

__all__ = ["check_checkpoint_options", "write_run_as_checkpoint"]


def check_checkpoint_options(options: RunOptions) -> None:
    """Refuse a checkpoint that could not be written, or would overwrite another model.

    Raises:
        UserError: Says why.
    """
    target = options.checkpoint
    if target is None:
        return
    where = f"--checkpoint {target}"
    if options.dtype == "bf16":
        cause = "group scales are float16, and a BF16 checkpoint would round them"
        raise UserError(where, cause, "run with --dtype fp16 or fp32")
    if target.resolve() == options.output.resolve():
        raise UserError(where, "is the run directory", "give the checkpoint a directory of its own")
    taken = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if taken and not _is_compressed_tensors(target):
        raise UserError(where, "holds files that are not such a checkpoint", "give an empty or a new directory")
    if target.resolve() == Path(options.model).resolve():
        raise UserError(where, "is the model itself", "give the checkpoint a directory of its own")


def _is_compressed_tensors(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == "compressed-tensors")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_run_as_checkpoint(
    checkpoint: Checkpoint, sites: Sites, directory: RunDirectory, options: RunOptions, copies: Mapping[Path, Path]
) -> dict[str, Any]:
    """Write the policy of a run as a checkpoint, with the tokenizer's files beside it; returns figures."""
    from calib.interchange.write import WriteOptions, write_checkpoint

    assert options.checkpoint is not None, "the stage is skipped without --checkpoint"
    assert options.dtype != "bf16", "check_checkpoint_options refuses it"
    figures = write_checkpoint(
        checkpoint,
        sites,
        read_policy(directory.policy),
        PolicyArrays(arrays_path(directory.policy)),
        options.checkpoint,
        WriteOptions(options.checkpoint_format, options.dtype, per_token=options.checkpoint_per_token),
    )
    for source, target in copies.items():
        shutil.copyfile(source, target)
    return figures
