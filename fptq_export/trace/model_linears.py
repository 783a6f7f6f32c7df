"""The linears of a torch model, and what trace has to know of them beside their size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fptq_export.experts.unstack import experts_of_linears
from fptq_export.experts.unstacked import UnstackedExperts

__all__ = ["LinearRole", "linears_from_model", "roles_from_model"]

_MATRIX_RANK = 2


@dataclass(frozen=True)
class LinearRole:
    """What is special about a linear."""

    expert: str | None = None
    """Path of the expert it belongs to: only tokens that chose this expert concern it."""
    float_reason: str | None = None
    """Why it keeps the float precision, where it must."""
    is_linear: bool = True
    """False for a module with a matrix of its own that is no linear by type, and one only if the graph says so."""


def linears_from_model(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Torch path -> (in_features, out_features): `nn.Linear`, GPT-2's `Conv1D`, and whatever may multiply alike."""
    return {path: _features(module) for path, module in model.named_modules() if _is_linear(module) or _may_be(module)}


def roles_from_model(model: nn.Module) -> dict[str, LinearRole]:
    """Roles of the linears that have one.

    * A linear of an expert.
    * A router: what stands beside experts and has an output for each of them, a linear or not.
    * Any other module that is no linear but has a matrix `weight`: what else it computes is not known.
    """
    roles = {path: LinearRole(expert=expert) for path, expert in experts_of_linears(model).items()}
    roles.update({
        path: LinearRole(
            float_reason=f"{type(module).__name__} does more than multiply by its weight: keeps the float precision",
            is_linear=False,
        )
        for path, module in model.named_modules()
        if _may_be(module)
    })  # fmt: skip
    for path, module, experts in _routers(model):
        reason = f"it scores the experts of {experts}, and a rounded score may choose others: keeps the float precision"
        roles[path] = LinearRole(float_reason=reason, is_linear=_is_linear(module))
    return roles


def _routers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path and module of every router, and the path of its experts."""
    for experts, module in model.named_modules():
        if not isinstance(module, UnstackedExperts):
            continue
        block = experts.rpartition(".")[0]
        for path, beside in model.get_submodule(block).named_modules(prefix=block):
            inside = path.startswith(f"{experts}.")
            if not inside and (_is_linear(beside) or _may_be(beside)) and _features(beside)[1] == module.num_experts:
                yield path, beside, experts


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _may_be(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return (
        weight is not None
        and weight.dim() == _MATRIX_RANK
        and not (_is_linear(module) or isinstance(module, nn.Embedding))
    )


def _features(module: nn.Module) -> tuple[int, int]:
    first, second = module.get_parameter("weight").shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)
