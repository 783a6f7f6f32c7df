"""Run the model on calibration tokens, block by block, and keep what quantization needs to know of linears' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from calib.batches import TokenBatches, auto_batch_size
from calib.stats import Stats
from calib.stream import BlockStream, LoadModel
from fptq_export.errors import UserError
from fptq_export.progress import Progress

__all__ = ["HessianSink", "observe"]


@dataclass(frozen=True)
class HessianSink:
    """Where the input Hessians go."""

    owners: Mapping[str, str]
    """Linear -> the linear under whose path the matrix of their common input is kept."""
    write: Callable[[str, torch.Tensor], None]
    """Takes the path of an owner and mean x x^T, float32 [in, in], as soon as it is complete."""


def observe(
    load: LoadModel,
    batches: TokenBatches,
    linears: Sequence[str],
    progress: Progress,
    batch_size: int = 0,
    hessians: HessianSink | None = None,
) -> Stats:
    """Measure max over tokens of |x_j| for every input channel j of every linear.

    Args:
        load: Gives the model, lazily; only one decoder block is in memory at a time. Parts that no observed linear
            belongs to (the head) are not run.
        batches: Tokens, [size, seq].
        linears: Torch paths of the linears to observe.
        progress: Reports tokens, counted once for each block.
        batch_size: Windows a forward pass; 0 chooses. The result does not depend on it, up to the order of float sums.
        hessians: Where mean x x^T goes, where a weight method needs it.

    Returns:
        float32 maxima for each linear.

    Raises:
        UserError: An activation is NaN or Inf, or a linear never ran.
    """
    size = batch_size or auto_batch_size(batches.tokens.shape[1])
    base = f"{load().base_model_prefix}."
    head = not all(path.startswith(base) for path in linears)
    stream = BlockStream(load, torch.from_numpy(batches.tokens), size, head=head)
    inputs = _Inputs(batches.count, hessians)
    in_blocks = _linears_by_block(linears, stream)
    with progress.task("calibrate", batches.count * max(stream.count, 1), unit="tokens x blocks") as task:
        for index, paths in enumerate(in_blocks):
            block = stream.load_block(index)
            with _hooks(block, f"{stream.path}.{index}.", paths, inputs):
                for tokens in stream.advance(index, block):
                    inputs.forget_tensor()
                    task.advance(tokens)
            inputs.finish()
        rest = [path for path in linears if not any(path in paths for paths in in_blocks)]
        if rest:
            _observe_rest(stream, rest, inputs)
        if not stream.count:
            task.advance(batches.count)
    missing = [path for path in linears if path not in inputs.absmax]
    if missing:
        raise UserError(f"layer {missing[0]}", "never ran in calibration", "calibrate on more text, or --exclude it")
    return Stats({path: inputs.absmax[path].numpy() for path in linears}, batches.count, batches.description)


@dataclass
class _Inputs:
    """What is known of the inputs so far. Linears that read the same tensor share one pass over it."""

    tokens: int
    sink: HessianSink | None
    absmax: dict[str, torch.Tensor] = field(default_factory=dict)
    _hessians: dict[str, torch.Tensor] = field(default_factory=dict)
    _tensor: torch.Tensor | None = None
    _reduced: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def update(self, path: str, x: torch.Tensor) -> None:
        """Take in one input, [..., in]."""
        if x is not self._tensor:
            self._tensor, self._reduced = x, _channel_absmax(x)
        if not self._reduced.isfinite().all():
            raise UserError(
                f"layer {path}",
                "its input is NaN or Inf in calibration",
                "check the weights; if they are fine, the model overflows on this text: use other text",
            )
        seen = self.absmax.get(path)
        self.absmax[path] = self._reduced.clone() if seen is None else torch.maximum(seen, self._reduced)
        if self.sink is not None and self.sink.owners[path] == path:
            self._add_to_hessian(path, x.reshape(-1, x.shape[-1]))

    def forget_tensor(self) -> None:
        """Let go of the last tensor, so that its memory is free and its identity cannot be met again."""
        self._tensor = None

    def finish(self) -> None:
        """Hand on the Hessians that are complete."""
        if self.sink is not None:
            for path, hessian in self._hessians.items():
                self.sink.write(path, hessian)
        self._hessians.clear()

    def _add_to_hessian(self, path: str, x: torch.Tensor) -> None:
        if path not in self._hessians:
            self._hessians[path] = torch.zeros(x.shape[1], x.shape[1])
        self._hessians[path].addmm_(x.T, x, alpha=1 / self.tokens)


def _channel_absmax(x: torch.Tensor) -> torch.Tensor:
    """Largest |x_j| over tokens, without a copy of |x|: [..., in] -> float32 [in]; a NaN stays NaN."""
    flat = x.reshape(-1, x.shape[-1])
    return torch.maximum(flat.amax(dim=0), -flat.amin(dim=0)).to(torch.float32)


@contextmanager
def _hooks(module: nn.Module, prefix: str, linears: Sequence[str], inputs: _Inputs) -> Iterator[None]:
    """Watch linears of a module whose own torch path is `prefix`."""

    def hook_for(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _module, args: inputs.update(path, args[0])

    handles = [
        module.get_submodule(path.removeprefix(prefix)).register_forward_pre_hook(hook_for(path)) for path in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe_rest(stream: BlockStream, linears: Sequence[str], inputs: _Inputs) -> None:
    """Watch linears outside the blocks."""

    def watch(model: nn.Module) -> None:
        for path in linears:
            model.get_submodule(path).register_forward_pre_hook(
                lambda _module, args, path=path: inputs.update(path, args[0])
            )

    stream.run_rest(watch)
    inputs.forget_tensor()
    inputs.finish()


def _linears_by_block(linears: Sequence[str], stream: BlockStream) -> list[list[str]]:
    return [[path for path in linears if path.startswith(f"{stream.path}.{index}.")] for index in range(stream.count)]
