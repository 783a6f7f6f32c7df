"""Run the model on calibration tokens, block by block, and keep what quantization needs to know of linears' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from calib.batches import TokenBatches, auto_batch_size
from calib.devices import CPU
from calib.hidden import HiddenStates
from calib.histograms import Histogram
from calib.padding import rows_of_tokens
from calib.ranks import ALONE, Ranks, share_of_rank
from calib.state import CalibrationState
from calib.stats import Stats
from calib.stream import BlockStream, LoadModel
from fptq_export.errors import UserError
from fptq_export.experts.unstack import experts_of_linears
from fptq_export.progress import Progress, Task

__all__ = ["Execution", "HessianSink", "hessians_of_block", "hessians_of_rest", "observe"]


@dataclass(frozen=True)
class HessianSink:
    """Where the input Hessians go."""

    owners: Mapping[str, str]
    """Linear -> the linear under whose path the matrix of their common input is kept."""
    write: Callable[[str, torch.Tensor], None]
    """Takes the path of an owner and mean x x^T, float32 [in, in], as soon as it is complete."""


@dataclass(frozen=True)
class Execution:
    """Where and how calibration runs. Results do not depend on it, up to the order of float sums."""

    device: torch.device = CPU
    """Runs the decoder blocks."""
    ranks: Ranks = ALONE
    """Processes that share the windows."""
    state: CalibrationState | None = None
    """Keeps finished blocks on disk and goes on after those that it has."""
    max_memory: int | None = None
    """Bytes of hidden states in memory; the rest stays with the state on disk."""

    def hidden_states(self) -> HiddenStates:
        """An empty store for them."""
        return HiddenStates(None if self.state is None else self.state.folder, self.max_memory)


IN_MEMORY = Execution()
"""One process on the CPU that writes nothing."""


def observe(
    load: LoadModel,
    batches: TokenBatches,
    linears: Sequence[str],
    progress: Progress,
    batch_size: int = 0,
    hessians: HessianSink | None = None,
    execution: Execution = IN_MEMORY,
    *,
    histograms: bool = False,
) -> Stats:
    """Measure max over tokens of |x_j| for every input channel j of every linear.

    Args:
        load: Gives the model, lazily; only one decoder block is in memory at a time. Parts that no observed linear
            belongs to (the head) are not run.
        batches: Tokens, [size, seq], the same on every rank; padding is not counted.
        linears: Torch paths of the linears to observe.
        progress: Reports tokens of this rank, counted once for each block.
        batch_size: Windows a forward pass; 0 chooses. The result does not depend on it, up to the order of float sums.
        hessians: Where mean x x^T goes, where a weight method needs it.
        execution: Device, ranks, limits.
        histograms: Count |x| too, where a range calibrator needs it.

    Returns:
        float32 maxima for each linear, and histograms where they are wanted, over the windows of all ranks. For a
        linear of an expert, over the tokens that chose the expert: 0 where none did.

    Raises:
        UserError: An activation is NaN or Inf, a linear never ran, or there are fewer windows than ranks.
        AnotherRankError: Calibration failed on another rank.
    """
    ranks = execution.ranks
    size = batch_size or auto_batch_size(_width(batches))
    share, size = share_of_rank(len(batches.tokens), size, ranks)
    tokens = torch.from_numpy(batches.tokens[share])
    features = None if batches.features is None else torch.from_numpy(batches.features[share])
    with ranks.together():
        base = f"{load().base_model_prefix}."
        head = not all(path.startswith(base) for path in linears)
        hidden = execution.hidden_states()
        where = execution.device
        stream = BlockStream(load, tokens, size, head=head, device=where, hidden=hidden, features=features)
    inputs = _Inputs(batches, hessians, lambda: stream.real_tokens, {} if histograms else None)
    in_blocks = _linears_by_block(linears, stream)
    with progress.task("calibrate", tokens.numel() * max(stream.count, 1), unit="tokens x blocks") as task:
        task.advance(_go_on(stream, inputs, execution) * tokens.numel())
        _observe_blocks(stream, in_blocks, inputs, execution, task)
        rest = [path for path in linears if not any(path in paths for paths in in_blocks)]
        if rest:
            _observe_rest(stream, rest, inputs, ranks)
        if not stream.count:
            task.advance(tokens.numel())
    missing = [path for path in linears if path not in inputs.absmax]
    with ranks.together():
        if missing:
            raise UserError(
                f"layer {missing[0]}", "never ran in calibration", "calibrate on more text, or --exclude it"
            )
    return inputs.stats(linears)


def _width(batches: TokenBatches) -> int:
    """Rows that a window takes where the model is widest: its tokens, or the frames of its features."""
    width: int = batches.tokens.shape[1] if batches.features is None else batches.features.shape[2]
    return width


def hessians_of_block(
    stream: BlockStream, index: int, block: nn.Module, owners: Mapping[str, str], batches: TokenBatches
) -> dict[str, torch.Tensor]:
    """Mean x x^T of the inputs of a block's linears for the hidden states that reached it; the stream stays.

    Args:
        stream: At the block.
        index: Of the block.
        block: From the stream.
        owners: Linear -> linear under whose path the matrix of their common input is kept, for the block's linears.
        batches: What the stream runs, all of it.

    Returns:
        Owner -> float32 [in, in] on the CPU; zeros for a linear of an expert that no token reached.

    Raises:
        UserError: An activation is NaN or Inf.
    """
    found: dict[str, torch.Tensor] = {}
    inputs = _Inputs(batches, HessianSink(owners, found.__setitem__), lambda: stream.real_tokens)
    with _hooks(block, f"{stream.path}.{index}.", tuple(owners), inputs):
        for _ in stream.replay(index, block):
            inputs.forget_tensor()
    _expect_experts(inputs, owners, block, f"{stream.path}.{index}.")
    inputs.finish(tuple(owners), ALONE, CPU)
    return found


def hessians_of_rest(stream: BlockStream, owners: Mapping[str, str], batches: TokenBatches) -> dict[str, torch.Tensor]:
    """The same for linears outside the blocks, once the stream has passed all of them."""
    found: dict[str, torch.Tensor] = {}
    inputs = _Inputs(batches, HessianSink(owners, found.__setitem__), lambda: stream.real_tokens)
    _observe_rest(stream, tuple(owners), inputs, ALONE)
    return found


def _go_on(stream: BlockStream, inputs: _Inputs, execution: Execution) -> int:
    """Take up what an earlier process finished; returns the number of blocks."""
    state = execution.state
    if state is None or state.stats is None:
        return 0
    with execution.ranks.together():
        stream.restore(state.blocks)
        inputs.restore(state.stats)
    return state.blocks


def _observe_blocks(
    stream: BlockStream, in_blocks: Sequence[Sequence[str]], inputs: _Inputs, execution: Execution, task: Task
) -> None:
    """Watch linears inside the blocks, from the first block that is not finished."""
    first = execution.state.blocks if execution.state is not None else 0
    for index, paths in enumerate(in_blocks[first:], start=first):
        with execution.ranks.together():
            block = stream.load_block(index)
            with _hooks(block, f"{stream.path}.{index}.", paths, inputs):
                for tokens in stream.advance(index, block):
                    inputs.forget_tensor()
                    task.advance(tokens)
            _expect_experts(inputs, paths, block, f"{stream.path}.{index}.")
        del block  # before the next one is loaded
        inputs.finish(paths, execution.ranks, execution.device)
        if execution.state is not None:
            execution.state.finish_block(index + 1, inputs.stats(inputs.absmax))


@dataclass
class _Inputs:
    """What is known of the inputs so far. Linears that read the same tensor share one pass over it."""

    batches: TokenBatches
    """Of all ranks."""
    sink: HessianSink | None
    real_tokens: Callable[[], torch.Tensor | None]
    """Where the batch that runs has tokens, and not padding; None where everywhere."""
    histograms: dict[str, Histogram] | None = None
    """None where they are not wanted."""
    absmax: dict[str, torch.Tensor] = field(default_factory=dict)
    _hessians: dict[str, torch.Tensor] = field(default_factory=dict)
    _tensor: torch.Tensor | None = None
    _rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """What counts of it."""
    _reduced: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _counted: Histogram | None = None

    def update(self, path: str, x: torch.Tensor) -> None:
        """Take in one input, [..., in]."""
        if x is not self._tensor:
            self._tensor, self._rows = x, rows_of_tokens(path, x, self.real_tokens())
            self._reduced, self._counted = _channel_absmax(self._rows), None
        if not self._reduced.isfinite().all():
            raise UserError(
                f"layer {path}",
                "its input is NaN or Inf in calibration",
                "check the weights; if they are fine, the model overflows on this text: use other text",
            )
        seen = self.absmax.get(path)
        self.absmax[path] = self._reduced.clone() if seen is None else torch.maximum(seen, self._reduced)
        if self.histograms is not None:
            self._count(path, self._rows, self.histograms)
        if self.sink is not None and self.sink.owners[path] == path:
            self._add_to_hessian(path, self._rows.reshape(-1, x.shape[-1]))

    def expect(self, path: str, linear: nn.Module) -> None:
        """Know of a linear of an expert, though no token may have reached it: then all that is known is 0."""
        if path in self.absmax:
            return
        weight = linear.get_parameter("weight")
        width = weight.shape[1]
        self.absmax[path] = weight.new_zeros(width)
        if self.histograms is not None:
            self.histograms[path] = Histogram.empty()
        if self.sink is not None and self.sink.owners[path] == path:
            self._hessians[path] = weight.new_zeros(width, width)

    def forget_tensor(self) -> None:
        """Let go of the last tensor, so that its memory is free and its identity cannot be met again."""
        self._tensor, self._rows = None, torch.empty(0)

    def finish(self, paths: Sequence[str], ranks: Ranks, device: torch.device) -> None:
        """Make what is known of linears that ran on a device that of all ranks, and hand on the complete Hessians."""
        self.absmax = {path: absmax.cpu() for path, absmax in self.absmax.items()}
        with torch.inference_mode():
            self._reduce(paths, ranks, device)
        with ranks.together():
            if self.sink is not None:
                for path, hessian in self._hessians.items():
                    self.sink.write(path, hessian.cpu())
        self._hessians.clear()

    def stats(self, paths: Iterable[str]) -> Stats:
        """What is known, as it is written."""
        absmax = {path: self.absmax[path].numpy() for path in paths}
        counted = {path: self.histograms[path] for path in absmax} if self.histograms is not None else {}
        return Stats(absmax, self.batches.count, self.batches.description, counted)

    def restore(self, stats: Stats) -> None:
        """Know what an earlier process knew."""
        self.absmax = {path: torch.from_numpy(absmax.copy()) for path, absmax in stats.channel_absmax.items()}
        if self.histograms is not None:
            self.histograms = dict(stats.histograms)

    def _reduce(self, paths: Sequence[str], ranks: Ranks, device: torch.device) -> None:
        """Maximum and sum over the ranks. An expert may have run on some of them only."""
        if ranks.size == 1 or not paths:
            return
        widths = torch.tensor([len(self.absmax.get(path, ())) for path in paths])
        ranks.max_(widths)
        for path, width in zip(paths, widths.tolist(), strict=True):
            if not width:
                continue
            ranks.max_(self.absmax.setdefault(path, torch.zeros(width)))
            if self.histograms is not None:
                self.histograms[path] = _sum_of_ranks(self.histograms.get(path, Histogram.empty()), ranks)
            if self.sink is not None and self.sink.owners[path] == path:
                ranks.sum_(self._hessians.setdefault(path, torch.zeros(width, width, device=device)))

    def _count(self, path: str, x: torch.Tensor, histograms: dict[str, Histogram]) -> None:
        if self._counted is None:
            self._counted = Histogram.from_values(x, self._reduced.max().item())
        seen = histograms.get(path)
        histograms[path] = self._counted if seen is None else seen.merge(self._counted)

    def _add_to_hessian(self, path: str, x: torch.Tensor) -> None:
        if path not in self._hessians:
            self._hessians[path] = x.new_zeros(x.shape[1], x.shape[1])
        self._hessians[path].addmm_(x.T, x, alpha=1 / self.batches.count)


def _sum_of_ranks(histogram: Histogram, ranks: Ranks) -> Histogram:
    exponent = torch.tensor([histogram.exponent])
    ranks.max_(exponent)
    counts = torch.from_numpy(histogram.with_exponent(int(exponent)).counts)
    ranks.sum_(counts)
    return Histogram(counts.numpy(), int(exponent))


def _expect_experts(inputs: _Inputs, paths: Iterable[str], block: nn.Module, prefix: str) -> None:
    """Know of the linears of a block's experts, reached or not."""
    for path in set(paths) & experts_of_linears(block, prefix).keys():
        inputs.expect(path, block.get_submodule(path.removeprefix(prefix)))


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


def _observe_rest(stream: BlockStream, linears: Sequence[str], inputs: _Inputs, ranks: Ranks) -> None:
    """Watch linears outside the blocks."""

    def watch(model: nn.Module) -> None:
        for path in linears:
            model.get_submodule(path).register_forward_pre_hook(
                lambda _module, args, path=path: inputs.update(path, args[0])
            )

    with ranks.together():
        stream.run_rest(watch)
        inputs.forget_tensor()
    inputs.finish(linears, ranks, CPU)


def _linears_by_block(linears: Sequence[str], stream: BlockStream) -> list[list[str]]:
    return [[path for path in linears if path.startswith(f"{stream.path}.{index}.")] for index in range(stream.count)]
