"""Put `UnstackedExperts` in the place of transformers' stacked experts, wherever that computes the same.

Which modules those are is told by their structure, not by a table of model families: `use_experts_implementation` of
transformers marks a class of experts and notes how its weights are laid out. What it says is then held against the
module's own forward, on random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.integrations.moe import use_experts_implementation

from fptq_export.errors import UserError
from fptq_export.experts.unstacked import Expert, UnstackedExperts
from fptq_export.stored_tensor import Rows

__all__ = ["PROJECTIONS", "experts_of_linears", "stacked_experts", "stacked_rows", "unstack_experts"]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_STACKED = ("gate_up_proj", "down_proj")
_MARKS: Mapping[str, tuple[bool, str]] = {
    "has_gate": (True, "its experts have no gate"),
    "has_bias": (False, "its experts have biases"),
    "has_post_expert_norm": (False, "a norm follows each expert"),
    "is_transposed": (False, "its weights are stored [in, out]"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
}
"""Attributes that transformers' decorator sets, what they must be, and what it means if they are not."""
_HINT = "export a dense decoder, or one with plain gated experts (Mixtral, Qwen3-MoE, OLMoE, ...)"
_MATRIX_RANK = 2
_PROBE_EXPERTS, _PROBE_TOKENS, _PROBE_HIDDEN, _PROBE_INTERMEDIATE = 3, 5, 4, 6
_PROBE_TOLERANCE = 64 * 2.0**-52
"""Relative to the largest output: two float64 programs of sums of at most 6 terms, three in a row; measured 2e-16."""


def stacked_rows(projection: str, expert: int, intermediate: int, hidden: int) -> tuple[str, Rows]:
    """The stacked parameter, and where `gate_proj`, `up_proj` or `down_proj` of an expert lies in it.

    `gate_up_proj` is [experts, 2 intermediate, hidden], gate above up; `down_proj` is [experts, hidden, intermediate].
    """
    if projection == "down_proj":
        return "down_proj", Rows(0, hidden, expert)
    start = intermediate if projection == "up_proj" else 0
    return "gate_up_proj", Rows(start, start + intermediate, expert)


def stacked_experts(model: nn.Module) -> dict[str, Any]:
    """Every module that transformers marks as stacked experts, by torch path."""
    return {path: module for path, module in model.named_modules() if _holds_stacked_experts(module)}


def unstack_experts(model: nn.Module, *, static: bool) -> tuple[str, ...]:
    """Replace every module of stacked experts, in place; weights are views of the stacked ones.

    Args:
        model: On any device, meta and fake tensors included.
        static: Which program of `UnstackedExperts` runs.

    Returns:
        Torch paths of the modules that were replaced.

    Raises:
        UserError: A module of experts computes something else, or stores its weights otherwise; says which and what.
    """
    found = stacked_experts(model)
    reasons: dict[tuple[type, ...], str | None] = {}
    for path, stacked in found.items():
        reason = _reason_in_layout(stacked)
        if reason is None:  # the same code in every layer is run once
            code = (type(stacked), type(stacked.act_fn))
            reason = reasons[code] if code in reasons else reasons.setdefault(code, _difference_from_forward(stacked))
        if reason is not None:
            cause = f"{type(stacked).__name__} cannot be taken apart into linears: {reason}"
            raise UserError(f"module {path}", cause, _HINT)
        model.set_submodule(path, _unstacked(stacked, static=static))
    return tuple(found)


def experts_of_linears(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """Path of each linear of an unstacked expert -> path of the expert, both behind a prefix."""
    return {
        f"{prefix}{path}.{number}.{name}": f"{prefix}{path}.{number}"
        for path, module in model.named_modules()
        if isinstance(module, UnstackedExperts)
        for number in range(len(module))
        for name in PROJECTIONS
    }


def _holds_stacked_experts(module: nn.Module) -> bool:
    ranks = [parameter.dim() for parameter in module.parameters(recurse=False)]
    return any(rank > _MATRIX_RANK for rank in ranks) and all(hasattr(module, mark) for mark in _MARKS)


def _reason_in_layout(module: Any) -> str | None:
    """What marks and weights say against a module being the sum that `UnstackedExperts` computes; None if nothing."""
    for mark, (wanted, words) in _MARKS.items():
        if getattr(module, mark) != wanted:
            return words
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if names != set(_STACKED):
        return f"it has the tensors {', '.join(sorted(names))}, not {' and '.join(_STACKED)}"
    experts, twice, hidden = module.gate_up_proj.shape
    if twice % 2 or module.down_proj.shape != (experts, hidden, twice // 2) or experts != module.num_experts:
        return f"its weights are {list(module.gate_up_proj.shape)} and {list(module.down_proj.shape)}"
    if type(module)._apply_gate.__module__ != use_experts_implementation.__module__:
        return "its gate is not act(gate) * up"
    return None


def _difference_from_forward(module: Any) -> str | None:
    """Run the module's own code, small and on random numbers, beside ours."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        random = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        twin = copy.copy(module)
        twin._parameters = {
            "gate_up_proj": nn.Parameter(draw(_PROBE_EXPERTS, 2 * _PROBE_INTERMEDIATE, _PROBE_HIDDEN)),
            "down_proj": nn.Parameter(draw(_PROBE_EXPERTS, _PROBE_HIDDEN, _PROBE_INTERMEDIATE)),
        }
        twin.num_experts = _PROBE_EXPERTS
        twin.config = SimpleNamespace(_experts_implementation="eager")
        # The last expert is chosen by no token, and one token chooses nothing.
        index = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 1], [_PROBE_EXPERTS, _PROBE_EXPERTS]])
        arguments = (draw(_PROBE_TOKENS, _PROBE_HIDDEN), index, draw(_PROBE_TOKENS, 2).abs())
        try:
            expected = twin(*arguments)
        except Exception as error:  # noqa: BLE001 (code of any model, which may fail in any way)
            return f"its forward cannot be run for comparison ({type(error).__name__}: {error})"
        for static in (False, True):
            given = _unstacked(twin, static=static)(*arguments)
            if not (given - expected).abs().max() <= _PROBE_TOLERANCE * expected.abs().max():
                return "its forward computes something else"
    return None


def _unstacked(module: Any, *, static: bool) -> UnstackedExperts:
    experts, twice, hidden = module.gate_up_proj.shape

    def weight(projection: str, expert: int) -> torch.Tensor:
        name, rows = stacked_rows(projection, expert, twice // 2, hidden)
        view: torch.Tensor = getattr(module, name).detach()[rows.matrix, rows.start : rows.stop]
        return view

    def expert(number: int) -> Expert:
        gate, up, down = (weight(projection, number) for projection in PROJECTIONS)
        return Expert(gate, up, down, module.act_fn)

    return UnstackedExperts(map(expert, range(experts)), static=static)
