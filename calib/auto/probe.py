"""What an error in a linear's output does to the prediction of the model, for every linear at once.

For a small error d in the outputs, the KL divergence of the predicted tokens is 1/2 d^T F d, with F the Fisher
information E[g g^T]: g is the gradient of -log p(y) for tokens y drawn from the model's own prediction. A few backward
passes give g for all linears. What is kept of E[g^2] is its rank-one form, a weight for each token times a weight for
each output channel: errors of different tokens and channels are taken as uncorrelated.

The whole model in float32 and its activations for one window are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fptq_export.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DRAWS", "MAX_ROWS", "Probe", "probe_linears"]

DRAWS = 4
"""Backward passes a window, each with other drawn tokens."""
MAX_ROWS = 256
"""Tokens of a window that are kept for a linear, evenly spaced: every candidate multiplies all of them."""


@dataclass(frozen=True)
class Probe:
    """Real inputs of a linear, and what an error in its output costs."""

    inputs: torch.Tensor
    """float32 [rows, in]."""
    row_weights: torch.Tensor
    """float32 [rows]."""
    channel_weights: torch.Tensor
    """float32 [out]."""

    def kl_of(self, error: torch.Tensor) -> float:
        """KL divergence in nats a token that an output error causes, float32 [rows, out]."""
        return 0.5 * float(self.row_weights @ error.square() @ self.channel_weights)


@dataclass
class _Gathered:
    inputs: list[torch.Tensor] = field(default_factory=list)
    row_sums: list[torch.Tensor] = field(default_factory=list)
    channel_sums: torch.Tensor | None = None

    def add_gradient(self, call: int, stride: int, gradient: torch.Tensor) -> None:
        """Add g^2 of one draw; rows that were not kept are stood for by those that were."""
        squares = gradient.reshape(-1, gradient.shape[-1])[::stride].to(torch.float32).square().mul_(stride)
        self.row_sums[call] += squares.sum(dim=1)
        channels = squares.sum(dim=0)
        self.channel_sums = channels if self.channel_sums is None else self.channel_sums.add_(channels)


def probe_linears(
    model: PreTrainedModel, windows: torch.Tensor, linears: Sequence[str], progress: Progress, seed: int = 0
) -> Mapping[str, Probe]:
    """Run token windows forward and backward, and keep what candidates are judged by.

    Args:
        model: In eval mode, float32.
        windows: int64 [windows, seq].
        linears: Torch paths.
        progress: Reports backward passes.
        seed: Of the drawn tokens.

    Returns:
        For each linear that ran, its probe.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    gathered = {path: _Gathered() for path in linears}
    with progress.task("measure sensitivity", len(windows) * DRAWS, unit="passes") as task:
        for window in windows:
            with _hooks(model, gathered), torch.enable_grad():
                logits = model(input_ids=window[None], use_cache=False).logits[0].to(torch.float32)
                log_probs = logits.log_softmax(dim=-1)
                for draw in range(DRAWS):
                    drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
                    loss = -log_probs.gather(1, drawn).sum()
                    loss.backward(retain_graph=draw < DRAWS - 1)
                    task.advance()
    tokens = windows.numel()
    return {path: _probe(found, tokens) for path, found in gathered.items() if found.channel_sums is not None}


def _probe(gathered: _Gathered, tokens: int) -> Probe:
    assert gathered.channel_sums is not None
    rows = torch.cat(gathered.row_sums)
    total = rows.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return Probe(torch.cat(gathered.inputs), rows / (total * DRAWS * tokens), gathered.channel_sums)


@contextmanager
def _hooks(model: PreTrainedModel, gathered: Mapping[str, _Gathered]) -> Iterator[None]:
    """Watch the linears of one forward pass; their inputs need a gradient, which starts at the embeddings."""

    def start(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    def watch(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found, rows = gathered[path], args[0].detach().reshape(-1, args[0].shape[-1])
            if not len(rows) or not output.requires_grad:
                return
            stride = -(-len(rows) // MAX_ROWS)
            call = len(found.inputs)
            found.inputs.append(rows[::stride].clone())
            found.row_sums.append(torch.zeros(len(found.inputs[call])))
            output.register_hook(lambda gradient: found.add_gradient(call, stride, gradient))

        return model.get_submodule(path).register_forward_hook(hook)

    handles = [model.get_input_embeddings().register_forward_hook(start), *(watch(path) for path in gathered)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
