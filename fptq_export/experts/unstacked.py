"""Experts as linears of their own: y = sum_e w_e down_e(act(gate_e(x)) * up_e(x)), w_e = 0 where a token chose others.

transformers keeps the experts of a layer as two parameters of three dimensions, which no linear can be made from. Here
each expert has an `nn.Linear` for each projection, in one of two programs for the same function:

* *routed*: an expert runs on the tokens that chose it, as in transformers. What a hook on its linears sees is what the
  expert will see, and an expert that no token chose does not run. The control flow depends on data.
* *static*: every expert runs on every token, and what was not chosen is dropped. A graph without control flow.

They differ in the order of a float sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import torch
from torch import nn

__all__ = ["Expert", "UnstackedExperts"]


class Expert(nn.Module):
    """A gated MLP.

    Args:
        gate: [intermediate, hidden].
        up: [intermediate, hidden].
        down: [hidden, intermediate].
        act_fn: Elementwise.
    """

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class UnstackedExperts(nn.ModuleList):
    """The experts of a layer; `forward` has the signature of transformers' experts.

    Args:
        experts: In order, at least one.
        static: Which of the two programs runs.
    """

    def __init__(self, experts: Iterable[Expert], *, static: bool) -> None:
        super().__init__(experts)
        self.num_experts = len(self)
        self.static = static

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden], int64 [tokens, k], [tokens, k] -> [tokens, hidden] in the type of the input.

        An index that is no expert's adds nothing.
        """
        run = self._every_expert if self.static else self._chosen_experts
        return run(hidden_states, top_k_index, top_k_weights)

    def _chosen_experts(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for number, expert in enumerate(self):
            tokens, places = torch.where(index == number)
            if len(tokens):
                part = expert(x[tokens]) * weights[tokens, places, None]
                total.index_add_(0, tokens, part.to(total.dtype))
        return total

    def _every_expert(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        numbers = torch.arange(self.num_experts, device=index.device)
        chosen = (index[..., None] == numbers).to(weights.dtype)
        of_experts = (chosen * weights[..., None]).sum(dim=1)  # [tokens, experts]
        # Not a product with 0 alone: an expert may overflow on a token that is not its own, and 0 x Inf is NaN.
        parts = [
            torch.where(weight == 0, 0.0, expert(x) * weight)
            for expert, weight in zip(self, of_experts.split(1, dim=1), strict=True)
        ]
        return reduce(torch.add, parts).to(x.dtype)


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A linear that holds this weight itself; no other is allocated or drawn."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
