"""The linears of a model, and their weights as [out, in] matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from calib.graph_weights import GraphWeights
from calib.load import Checkpoint, read_tensor, skeleton_from_checkpoint
from fptq_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LinearWeights", "linears_from_model", "weight_from_linear", "weights_from_source"]


def linears_from_model(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear by torch path, in module order: `nn.Linear`, and GPT-2's `Conv1D`, which stores [in, out]."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def weight_from_linear(linear: nn.Module) -> torch.Tensor:
    """The weight of a linear as [out, in], a view of its parameter."""
    weight: torch.Tensor = linear.get_parameter("weight")
    return weight.T if isinstance(linear, Conv1D) else weight


@dataclass(frozen=True)
class LinearWeights:
    """Weights of a checkpoint by the path of their linear, read one at a time."""

    checkpoint: Checkpoint
    shapes: Mapping[str, tuple[int, int]]
    """Path -> (out, in)."""
    _transposed: frozenset[str]
    _tied: Mapping[str, str]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> LinearWeights:
        """Look up the linears of the model that the config describes; no weight is read."""
        skeleton = skeleton_from_checkpoint(checkpoint)
        linears = linears_from_model(skeleton)
        shapes = {path: tuple(weight_from_linear(linear).shape) for path, linear in linears.items()}
        return cls(
            checkpoint,
            {path: (out_features, in_features) for path, (out_features, in_features) in shapes.items()},
            frozenset(path for path, linear in linears.items() if isinstance(linear, Conv1D)),
            skeleton.get_expanded_tied_weights_keys(all_submodels=True),
        )

    def read(self, path: str) -> torch.Tensor:
        """The weight of one linear, float32 [out, in].

        Raises:
            UserError: The model has no such linear, or the checkpoint does not hold its weight.
        """
        if path not in self.shapes:
            raise UserError(f"layer {path}", "the model has no such linear", "trace the model again")
        name = f"{path}.weight"
        if name not in self.checkpoint.tensors:
            name = self._tied.get(name, name)
        weight = read_tensor(self.checkpoint, name)
        return (weight.T if path in self._transposed else weight).to(torch.float32).contiguous()


def weights_from_source(source: Checkpoint | GraphWeights) -> LinearWeights | GraphWeights:
    """The weights of whatever is quantized, by the path of their linear."""
    return source if isinstance(source, GraphWeights) else LinearWeights.from_checkpoint(source)
