"""The float model, block by block: what each linear reads, and its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.halves import calibrated_model_from_checkpoint
from calib.linears import weight_from_linear
from calib.load import Checkpoint, stored_dtype
from calib.stream import BlockStream
from fptq_export.errors import UserError

__all__ = ["FloatLinear", "FloatModel"]


@dataclass(frozen=True)
class FloatLinear:
    """One linear of the float model on the text."""

    x: NDArray[np.float32]
    """Its input, [rows, in]; of an expert the tokens that chose it, which may be none."""
    weight: NDArray[np.float32]
    """[out, in]."""


class FloatModel:
    """The float model on its way through a text; one block is in memory.

    Args:
        checkpoint: The model that was quantized.
        tokens: int64 [windows, seq].

    Raises:
        UserError: The model has no list of blocks.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> None:
        load = partial(calibrated_model_from_checkpoint, checkpoint, stored_dtype(checkpoint))
        self._stream = BlockStream(load, torch.from_numpy(tokens), len(tokens), head=True)
        if self._stream.path is None:
            raise UserError(checkpoint.name, "has no list of blocks", "fptq-export verify DIR compares it as a whole")
        self.blocks = self._stream.path
        """Torch path of the list of blocks."""
        self.count = self._stream.count
        self._block: nn.Module | None = None

    def hidden(self) -> NDArray[np.float32]:
        """The hidden states where the model is, [windows, seq, H]."""
        hidden: NDArray[np.float32] = self._stream.hidden(0).numpy()
        return hidden

    def pass_block(self, index: int, paths: tuple[str, ...]) -> dict[str, FloatLinear]:
        """Run a block; gives its linears by path."""
        block = self._stream.load_block(index)
        inputs: dict[str, NDArray[np.float32]] = {}
        modules = {path: block.get_submodule(path.removeprefix(f"{self.blocks}.{index}.")) for path in paths}
        with _recorded_inputs(modules, inputs):
            for _ in self._stream.advance(index, block):
                pass
        return _linears(modules, inputs)

    def outside(self, paths: tuple[str, ...]) -> tuple[dict[str, FloatLinear], NDArray[np.float32]]:
        """Run what lies outside the blocks on the hidden states where the model is: linears, logits [B, S, V]."""
        inputs: dict[str, NDArray[np.float32]] = {}
        modules: dict[str, nn.Module] = {}
        logits: list[NDArray[np.float32]] = []
        handles: list[Any] = []

        def prepare(model: nn.Module) -> None:
            modules.update({path: model.get_submodule(path) for path in paths})
            handles.extend(_hook(path, module, inputs) for path, module in modules.items())
            handles.append(model.register_forward_hook(lambda _module, _args, output: logits.append(_logits(output))))

        self._stream.run_rest(prepare)
        for handle in handles:
            handle.remove()
        return _linears(modules, inputs), logits[0]


@contextmanager
def _recorded_inputs(modules: Mapping[str, nn.Module], inputs: dict[str, NDArray[np.float32]]) -> Iterator[None]:
    handles = [_hook(path, module, inputs) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(path: str, module: nn.Module, inputs: dict[str, NDArray[np.float32]]) -> Any:
    def record(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1])
        inputs[path] = rows.to(torch.float32, copy=True).numpy()

    hook: Callable[..., Any] = record
    return module.register_forward_pre_hook(hook)


def _linears(modules: Mapping[str, nn.Module], inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, FloatLinear]:
    """Without rows where no token chose an expert."""
    found = {}
    for path, module in modules.items():
        weight: NDArray[np.float32] = weight_from_linear(module).detach().to(torch.float32).numpy()
        found[path] = FloatLinear(inputs.get(path, np.zeros((0, weight.shape[1]), np.float32)), weight)
    return found


def _logits(output: Any) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = output.logits.to(torch.float32).numpy()
    return logits
