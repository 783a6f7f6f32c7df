"""A rotated copy of a model, as a Hugging Face directory: tensor by tensor, computed in float64, stored in float32.

float32 holds every FP16 and BF16 weight, so the only rounding is that of a rotated weight, once, to 24 bits.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calib.load import Checkpoint, read_tensor, skeleton_from_checkpoint
from calib.model_config import CONFIG_FILE, changed_config
from calib.rotation.hadamard import Rotation, rotation_of_size
from calib.rotation.labels import Channels
from calib.rotation.roles import HINT, ResidualRoles, roles_from_model
from calib.tensor_files import WEIGHTS_FILE
from fptq_export.errors import UserError
from fptq_export.files import write_text
from fptq_export.progress import Progress
from fptq_export.tensor_writer import TensorSpec, tensor_writer

__all__ = ["check_rotation", "rotated_parameter", "write_rotated"]

_ELEMENTS = 2**24
"""Of a matrix in float64 at a time: 128 MiB."""


@dataclass(frozen=True)
class _Plan:
    """How every parameter of the rotated model comes about."""

    rotation: Rotation
    roles: ResidualRoles
    sources: dict[str, str]
    """Parameter -> tensor of the checkpoint. A head that is tied to the embedding gets a copy of its own."""
    shapes: dict[str, tuple[int, ...]]


def check_rotation(checkpoint: Checkpoint) -> None:
    """Refuse a model that cannot be rotated exactly. Reads no weight and takes seconds.

    Raises:
        UserError: Names the module, or the size of the residual stream, and the reason.
    """
    _plan(checkpoint)


def write_rotated(
    checkpoint: Checkpoint, directory: Path, copies: Iterable[Path], progress: Progress
) -> dict[str, int]:
    """Write the rotated model; `config.json` comes last.

    Args:
        checkpoint: The float model.
        directory: Where config, weights (4 bytes each) and copies go.
        copies: Files that belong to the model too: those of its tokenizer.
        progress: Reports tensors.

    Returns:
        How many linears read and write the residual stream, for the summary.

    Raises:
        UserError: As `check_rotation`; or a tensor is missing.
    """
    plan = _plan(checkpoint)
    specs = {name: TensorSpec.of("float32", *shape) for name, shape in plan.shapes.items()}
    with (
        tensor_writer(directory / WEIGHTS_FILE, specs, {"format": "pt"}) as writer,
        progress.task("rotate", len(specs), unit="tensors") as task,
    ):
        for name, source in plan.sources.items():
            tensor = read_tensor(checkpoint, source)
            scale = _fold_scale(plan.roles.readers.get(name), checkpoint, plan)
            writer.write(name, rotated_parameter(name, tensor, plan.roles, plan.rotation, scale).numpy())
            task.advance()
    for path in copies:
        shutil.copyfile(path, directory / path.name)
    write_text(changed_config(checkpoint.directory, tie_word_embeddings=False), directory / CONFIG_FILE)
    return {
        "readers": len(plan.roles.readers),
        "writers": sum(len(plan.shapes[name]) == 2 for name in plan.roles.writers),
    }


def rotated_parameter(
    name: str, tensor: torch.Tensor, roles: ResidualRoles, rotation: Rotation, scale: torch.Tensor | None
) -> torch.Tensor:
    """One parameter of the rotated model, float32, shape kept.

    With row vectors, x -> x Q: a reader W becomes W diag(scale) Q, a writer W becomes Q^T W with bias b Q, and a table
    E becomes E Q.

    Args:
        name: Of the parameter.
        tensor: As stored.
        roles: What it does.
        rotation: Q.
        scale: float64 [size], the norm weight that a reader takes over.
    """
    norms = roles.norms()
    if name in norms:
        return torch.full(tensor.shape, norms[name], dtype=torch.float32)
    if name in roles.readers:
        tensor = _rows_rotated(tensor, rotation, scale)
    if name in roles.tables or (name in roles.writers and tensor.ndim == 1):
        return _rows_rotated(tensor.reshape(-1, rotation.size), rotation, None).reshape(tensor.shape)
    if name in roles.writers:
        return _rows_rotated(tensor.T, rotation, None).T.contiguous()
    return tensor.to(torch.float32).contiguous()


def _rows_rotated(matrix: torch.Tensor, rotation: Rotation, scale: torch.Tensor | None) -> torch.Tensor:
    """Rows x diag(scale) x Q: [m, n] -> float32 [m, n], some rows in float64 at a time."""
    result = torch.empty(matrix.shape, dtype=torch.float32)
    rows = max(1, _ELEMENTS // rotation.size)
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows].to(torch.float64)
        result[start : start + rows] = rotation.apply(part if scale is None else part * scale)
    return result


def _plan(checkpoint: Checkpoint) -> _Plan:
    where = "--rotate"
    if checkpoint.given is not None:
        cause = f"the model came with INT4 codes ({checkpoint.given.format}), which belong to the weights as they are"
        raise UserError(where, cause, "give the float model, or leave --rotate out")
    untied = replace(checkpoint, config=_untied(checkpoint.config))
    skeleton = skeleton_from_checkpoint(untied)
    shared = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    if shared:
        raise UserError(where, f"the model shares weights in a way that its config cannot undo ({min(shared)})", HINT)
    roles = roles_from_model(skeleton)
    rotation = rotation_of_size(roles.size)
    if rotation is None:
        raise UserError(
            where, f"no Hadamard matrix of order {roles.size}, the size of its residual stream, is known", HINT
        )
    tied = skeleton_from_checkpoint(checkpoint).get_expanded_tied_weights_keys(all_submodels=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    sources = {name: tied.get(name, name) for name in shapes}
    for name, source in sources.items():
        entry = checkpoint.tensors.get(source)
        if entry is None or entry.shape != shapes[name]:
            cause = "the checkpoint stores it under another name or in another shape than the model has it"
            raise UserError(f"parameter {name}", cause, HINT)
    return _Plan(rotation, roles, sources, shapes)


def _fold_scale(channels: Channels | None, checkpoint: Checkpoint, plan: _Plan) -> torch.Tensor | None:
    if channels is None:
        return None
    return read_tensor(checkpoint, plan.sources[channels.parameter]).to(torch.float64) + channels.offset


def _untied(config: Any) -> Any:
    untied = copy.deepcopy(config)
    for part in (untied, untied.get_text_config()):
        part.tie_word_embeddings = False
    return untied
