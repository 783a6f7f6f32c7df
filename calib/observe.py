"""Run the model on calibration tokens and keep the largest magnitude of every linear's input channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from calib.batches import TokenBatches, auto_batch_size
from calib.stats import Stats, read_stats, write_stats
from fptq_export.errors import UserError
from fptq_export.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Stats", "observe", "read_stats", "write_stats"]


def observe(
    model: PreTrainedModel,
    batches: TokenBatches,
    linears: Sequence[str],
    progress: Progress,
    batch_size: int = 0,
) -> Stats:
    """Measure max over tokens of |x_j| for every input channel j of every linear.

    Args:
        model: In eval mode. Parts that no observed linear belongs to (the head) are not run.
        batches: Tokens, [size, seq].
        linears: Torch paths of the linears to observe.
        progress: Reports tokens.
        batch_size: Windows a forward pass; 0 chooses. The result does not depend on it, up to the order of float sums.

    Returns:
        float32 maxima for each linear.

    Raises:
        UserError: An activation is NaN or Inf, or a linear never ran.
    """
    maxima = _RunningMaxima()
    body = _smallest_module_with(model, linears)
    size = batch_size or auto_batch_size(batches.tokens.shape[1])
    tokens = torch.from_numpy(batches.tokens)
    with _hooks(model, linears, maxima.update), progress.task("calibrate", batches.count, unit="tokens") as task:
        for ids in tokens.split(size):
            with torch.inference_mode():
                body(input_ids=ids, use_cache=False)
            maxima.forget_input()
            task.advance(ids.numel())
    missing = [path for path in linears if path not in maxima.by_layer]
    if missing:
        raise UserError(f"layer {missing[0]}", "never ran in calibration", "calibrate on more text, or --exclude it")
    return Stats({path: maxima.by_layer[path].numpy() for path in linears}, batches.count, batches.description)


class _RunningMaxima:
    """Channel maxima of every layer so far. Linears that read the same tensor share one pass over it."""

    def __init__(self) -> None:
        self.by_layer: dict[str, torch.Tensor] = {}
        self._input: torch.Tensor | None = None
        self._reduced = torch.empty(0)

    def update(self, path: str, x: torch.Tensor) -> None:
        """Take in one input, [..., in]."""
        if x is not self._input:
            self._input, self._reduced = x, _channel_absmax(x)
        if not self._reduced.isfinite().all():
            raise UserError(
                f"layer {path}",
                "its input is NaN or Inf in calibration",
                "check the weights; if they are fine, the model overflows on this text: use other text",
            )
        seen = self.by_layer.get(path)
        self.by_layer[path] = self._reduced.clone() if seen is None else torch.maximum(seen, self._reduced)

    def forget_input(self) -> None:
        """Let go of the last tensor, so that its memory is free and its identity cannot be met again."""
        self._input = None


def _channel_absmax(x: torch.Tensor) -> torch.Tensor:
    """Largest |x_j| over tokens, without a copy of |x|: [..., in] -> float32 [in]; a NaN stays NaN."""
    flat = x.reshape(-1, x.shape[-1])
    return torch.maximum(flat.amax(dim=0), -flat.amin(dim=0)).to(torch.float32)


@contextmanager
def _hooks(model: nn.Module, linears: Sequence[str], update: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def hook_for(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _module, inputs: update(path, inputs[0])

    handles = [model.get_submodule(path).register_forward_pre_hook(hook_for(path)) for path in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _smallest_module_with(model: PreTrainedModel, linears: Sequence[str]) -> nn.Module:
    """The base model when every linear is in it, which leaves out the head: a quarter of SmolLM2's work."""
    prefix = f"{model.base_model_prefix}."
    return model.base_model if all(path.startswith(prefix) for path in linears) else model
