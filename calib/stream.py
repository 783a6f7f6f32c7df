"""Run a model block by block: one block and the hidden states of all windows are in memory, nothing else.

Blocks run on any device; hidden states wait on the CPU, or in files where they exceed a limit. What lies outside the
blocks (embedding, head) runs on the CPU. So a model larger than a GPU needs no map of devices.

The model is opened lazily (its parameters are a memory map of the checkpoint), so opening it again for each block costs
a fraction of a second and lets go of the pages of the block before. Everything runs in float32, whatever is stored.

What each block is called with beside the hidden states (masks, position embeddings) does not depend on them. One pass
over the tokens in which blocks hand on their input records it; real blocks then run on the record. Where the first
block itself gives what the others are called with (the position biases of T5), it runs in that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calib.devices import CPU
from calib.hidden import HiddenStates
from calib.padding import model_inputs, real_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BlockStream", "LoadModel", "blocks_path"]

LoadModel = Callable[[], "PreTrainedModel"]
"""Gives the model anew with each call, in eval mode. What it gives is changed and thrown away."""


@dataclass(frozen=True)
class _Call:
    """Arguments of one block for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def blocks_path(model: nn.Module) -> str | None:
    """Torch path of the list of decoder blocks: of the lists that lie in no other list, the one with most parameters.

    Returns:
        None where the model has no list of modules.
    """
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return max(outer, key=lambda path: _parameter_count(model.get_submodule(path)), default=None)


class BlockStream:
    """Hidden states of token windows on their way through the blocks.

    Args:
        load: Gives the model.
        tokens: int64 [windows, seq]; `PADDING` where a window is shorter.
        batch_size: Windows a forward pass. Results do not depend on it, up to the order of float sums.
        head: Whether `run_rest` runs the head too.
        device: Where blocks run.
        hidden: Keeps the hidden states; in memory if not given.
        features: What an encoder of speech reads, [windows, mel bins, frames].
    """

    def __init__(
        self,
        load: LoadModel,
        tokens: torch.Tensor,
        batch_size: int,
        *,
        head: bool,
        device: torch.device = CPU,
        hidden: HiddenStates | None = None,
        features: torch.Tensor | None = None,
    ) -> None:
        self._load = load
        self._head = head
        self._device = device
        self._batches = tokens.split(batch_size)
        self._features = None if features is None else features.split(batch_size)
        model = load()
        self.path = blocks_path(model)
        self.count = 0 if self.path is None else len(_blocks(model, self.path))
        self._calls: list[list[_Call]] = [[] for _ in range(self.count)]
        self._hidden = HiddenStates() if hidden is None else hidden
        self._first: nn.Module | None = None
        self._beside: tuple[Any, ...] | None = None
        """What blocks return behind the hidden states; None where they return no tuple."""
        self._running = 0
        if self.count:
            self._record(model)

    def load_block(self, index: int) -> nn.Module:
        """One block in float32 on the device. Nobody else has it: it may be changed."""
        block: nn.Module = _blocks(self._load(), self.path)[index]
        return block.to(self._device, torch.float32)

    def restore(self, count: int) -> None:
        """Go on after the first blocks, with the hidden states that an earlier process wrote."""
        self._hidden.restore(count)
        self._calls[:count] = [[] for _ in range(count)]

    @property
    def real_tokens(self) -> torch.Tensor | None:
        """Where the batch that runs has tokens, bool [windows, seq]; None where everywhere."""
        return real_tokens(self._batches[self._running])

    def replay(self, index: int, block: nn.Module) -> Iterator[torch.Tensor]:
        """Run a block on every batch that reached it and give its outputs; the stream stays where it is."""
        for batch in range(len(self._calls[index])):
            self._running = batch
            with torch.no_grad():
                output = self.output(index, block, batch)
            yield output

    def output(self, index: int, block: nn.Module, batch: int) -> torch.Tensor:
        """What a block makes of one batch that reached it, on the device; differentiable where gradients are on."""
        hidden = self._hidden.read(batch)
        return _hidden_from_output(_run(block, hidden, self._calls[index][batch], self._device))

    @property
    def batches(self) -> int:
        """Into how many batches the windows are split."""
        return len(self._batches)

    def hidden(self, batch: int) -> torch.Tensor:
        """The hidden states of one batch where the stream is: outputs of the last block that it passed."""
        return self._hidden.read(batch)

    def advance(self, index: int, block: nn.Module) -> Iterator[int]:
        """Replace the hidden states by the block's outputs; gives the tokens of each batch as it is done."""
        for batch, output in enumerate(self.replay(index, block)):
            self._hidden.write(batch, output)
            yield self._batches[batch].numel()
        self._hidden.finish_block()
        self._calls[index] = []

    def run_rest(self, prepare: Callable[[nn.Module], Any]) -> None:
        """Run what lies outside the blocks, with the hidden states of the last block in their place.

        Args:
            prepare: Called with the module that runs, before it runs: for hooks.
        """
        model = self._load()
        body = self._outside_in_float32(model)
        blocks = _blocks(model, self.path)
        for block in blocks[:-1]:
            block.forward = lambda *args, **kwargs: self._as_output(_hidden_from_arguments(args, kwargs))
        if blocks:
            outputs = map(self._hidden.read, range(len(self._hidden)))  # one for each batch, in the order they run
            blocks[-1].forward = lambda *_args, **_kwargs: self._as_output(next(outputs))
        prepare(model)
        for batch in range(len(self._batches)):
            self._running = batch
            self._run_body(body, batch)

    def _record(self, model: PreTrainedModel) -> None:
        """Run the tokens through blocks that hand on their input, and keep what each is called with."""
        body = self._outside_in_float32(model)
        for index, block in enumerate(_blocks(model, self.path)):
            block.forward = self._recorder(index)
        self._first = self.load_block(0)
        for batch in range(len(self._batches)):
            self._run_body(body, batch)
            if self._first is not None and not self._reads_beside():
                self._first, self._beside = None, self._beside and (None,) * len(self._beside)
        self._first = None

    def _run_body(self, body: nn.Module, batch: int) -> None:
        inputs = model_inputs(self._batches[batch], getattr(body, "config", None))
        if self._features is not None:
            inputs["input_features"] = self._features[batch]
        # Not inference mode: blocks that are trained keep what this records for their backward pass.
        with torch.no_grad():
            body(**inputs, use_cache=False)

    def _reads_beside(self) -> bool:
        """Whether a block is called with what the first one returned behind the hidden states."""
        calls = (call for recorded in self._calls[1:] for call in recorded)
        read = {id(value) for call in calls for value in (*call.args, *call.kwargs.values())}
        return any(id(part) in read for part in self._beside or () if part is not None)

    def _recorder(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = _hidden_from_arguments(args, kwargs)
            call = _Call(args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"})
            self._calls[index].append(call)
            if index == 0:
                self._hidden.append(hidden)
                if self._first is not None:
                    self._beside = _beside_hidden(_run(self._first, hidden, call, self._device))
            return self._as_output(hidden)

        return forward

    def _as_output(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form that a block of this model returns: a tensor, or a tuple that starts with it."""
        return hidden if self._beside is None else (hidden, *self._beside)

    def _outside_in_float32(self, model: PreTrainedModel) -> nn.Module:
        """The part of the model that runs, with its blocks emptied and everything else in float32."""
        body = model if self._head else model.base_model
        for block in _blocks(model, self.path):
            block.to("meta")
        return body.to(torch.float32)


def _run(block: nn.Module, hidden: torch.Tensor, call: _Call, device: torch.device) -> Any:
    if device != CPU:
        from accelerate.utils import send_to_device

        hidden, call = hidden.to(device), _Call(*send_to_device((call.args, call.kwargs), device))
    return block(hidden, *call.args, **call.kwargs)


def _hidden_from_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _hidden_from_output(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _beside_hidden(output: Any) -> tuple[Any, ...] | None:
    """What a block returns behind the hidden states, on the CPU; None where it returns no tuple."""
    if not isinstance(output, tuple):
        return None
    return tuple(part.cpu() if isinstance(part, torch.Tensor) else None for part in output[1:])


def _blocks(model: nn.Module, path: str | None) -> list[Any]:
    return [] if path is None else list(model.get_submodule(path).children())


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
