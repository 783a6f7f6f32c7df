"""Everything that can be wrong with a checkpoint, found before any long work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch

from calib.linears import linears_from_model
from calib.load import (
    Checkpoint,
    disagreement_from_checkpoint,
    read_tensor,
    skeleton_from_checkpoint,
    tokenizer_from_checkpoint,
)
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.progress import Progress

__all__ = ["FLOAT16_MAX", "GraphDtype", "check_checkpoint"]

FLOAT16_MAX = 65504.0
"""Largest finite float16, (2 - 2^-10) * 2^15."""

GraphDtype = Literal["float16", "bfloat16", "float32"]


def check_checkpoint(
    checkpoint: Checkpoint,
    progress: Progress,
    *,
    dtype: GraphDtype = "float16",
    needs_tokenizer: bool = True,
) -> None:
    """Refuse a checkpoint that a later stage would stumble over.

    Files that are missing, cut off or pickled are found earlier, when the checkpoint is opened.

    Args:
        checkpoint: The opened model.
        progress: Reports bytes read.
        dtype: Type of the exported graph; float16 also asks that every weight fits it.
        needs_tokenizer: Whether text will be read; token ids and random tokens need no tokenizer.

    Raises:
        UserErrors: Tensors and config disagree, or weights hold NaN, Inf or values that do not fit; all at once.
        UserError: The model has no linear to quantize, or no tokenizer.
    """
    _check_structure(checkpoint)
    _check_has_linears(checkpoint)
    if needs_tokenizer:
        tokenizer_from_checkpoint(checkpoint)
    _check_values(checkpoint, progress, dtype)


def _check_structure(checkpoint: Checkpoint) -> None:
    found = disagreement_from_checkpoint(checkpoint)
    problems = [
        *(Problem(_path(name), "config.json describes this tensor, but no file holds it") for name in found.missing),
        *(Problem(_path(name), "config.json describes no such tensor") for name in found.unexpected),
        *(
            Problem(_path(name), f"stored as {list(stored)}, but config.json describes {list(wanted)}")
            for name, stored, wanted in found.mismatched
        ),
    ]
    if problems:
        raise UserErrors(
            str(checkpoint.directory),
            problems,
            "config.json and the weights belong to different models: fetch both again",
        )


def _check_has_linears(checkpoint: Checkpoint) -> None:
    skeleton = skeleton_from_checkpoint(checkpoint)
    head = skeleton.get_output_embeddings()
    if not any(linear is not head for linear in linears_from_model(skeleton).values()):
        raise UserError(
            str(checkpoint.directory),
            f"{type(skeleton).__name__} has no linear layer to quantize",
            "give a transformer",
        )


def _check_values(checkpoint: Checkpoint, progress: Progress, dtype: GraphDtype) -> None:
    problems = list(_value_problems(checkpoint, progress, dtype))
    if problems:
        raise UserErrors(
            str(checkpoint.directory),
            problems,
            "export with --dtype bf16 or fp32 if values are too large; fetch the weights again if they are NaN or Inf",
        )


def _value_problems(checkpoint: Checkpoint, progress: Progress, dtype: GraphDtype) -> Iterator[Problem]:
    limit = FLOAT16_MAX if dtype == "float16" else math.inf
    with progress.task("check weights", len(checkpoint.tensors), unit="tensors") as task:
        for name in checkpoint.tensors:
            tensor = read_tensor(checkpoint, name)
            task.advance()
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            # aminmax makes no copy, and a NaN anywhere comes out in both results.
            low, high = (value.item() for value in torch.aminmax(tensor))
            if math.isnan(low):
                yield Problem(_path(name), "holds NaN")
            elif math.isinf(low) or math.isinf(high):
                yield Problem(_path(name), "holds Inf")
            elif max(-low, high) > limit:
                yield Problem(_path(name), f"holds {max(-low, high):g}, more than float16 can ({FLOAT16_MAX:g})")


def _path(name: str) -> str:
    return f'$["{name}"]'
