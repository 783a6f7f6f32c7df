from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fptq_export.experts.unstacked import Expert, UnstackedExperts
from fptq_export.trace.model_linears import linears_from_model, roles_from_model

EXPERTS = 3


class Product(nn.Module):
    """A matrix of its own, as transformers' routers have."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rows, 8))


def model(**modules: nn.Module) -> nn.Module:
    """A block of three experts with other modules beside them, below `block`."""
    weights = torch.ones(4, 8), torch.ones(4, 8), torch.ones(8, 4)
    experts = UnstackedExperts([Expert(*weights, nn.SiLU()) for _ in range(EXPERTS)], static=True)
    return nn.ModuleDict({"block": nn.ModuleDict({"experts": experts, **modules})})


def test_linears_of_an_expert_know_it() -> None:
    """Each of the three, and their features."""
    block = model()
    assert linears_from_model(block)["block.experts.1.down_proj"] == (4, 8)
    roles = roles_from_model(block)
    assert len(roles) == 3 * EXPERTS
    assert roles["block.experts.1.down_proj"].expert == "block.experts.1"
    assert all(role.float_reason is None for role in roles.values())


def test_what_has_an_output_for_each_expert_is_a_router() -> None:
    """A module of its own kind, a linear, or a linear inside a module: all keep the float precision."""
    inner = nn.ModuleDict({"layer": nn.Linear(8, EXPERTS)})
    roles = roles_from_model(model(gate=Product(EXPERTS), router=nn.Linear(8, EXPERTS), deep=inner))
    for path in ("block.gate", "block.router", "block.deep.layer"):
        assert "scores the experts of block.experts" in str(roles[path].float_reason)
    assert not roles["block.gate"].is_linear
    assert roles["block.router"].is_linear


def test_shared_expert_is_no_router() -> None:
    """Linears beside the experts with other numbers of outputs may be quantized."""
    roles = roles_from_model(model(shared_expert=nn.Linear(8, 4), shared_expert_gate=nn.Linear(8, 1)))
    assert not {"block.shared_expert", "block.shared_expert_gate"} & roles.keys()


def test_module_with_a_matrix_keeps_the_float_precision() -> None:
    """What else it computes is not known, so its product is never quantized."""
    role = roles_from_model(nn.ModuleDict({"product": Product(5)}))["product"]
    assert "does more than multiply" in str(role.float_reason)
    assert not role.is_linear


def test_plain_modules_have_no_role() -> None:
    """Linears, GPT-2's Conv1D, embeddings and norms are what they were."""
    block = nn.ModuleDict(
        {"fc": nn.Linear(8, 4), "conv": Conv1D(4, 8), "table": nn.Embedding(8, 4), "n": nn.LayerNorm(8)}
    )
    assert roles_from_model(block) == {}
    assert linears_from_model(block) == {"fc": (8, 4), "conv": (8, 4)}
