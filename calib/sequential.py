"""Quantize the weights block by block, each block with the inputs that the quantized blocks before it give.

A weight method that looks at inputs (GPTQ, arXiv 2210.17323) can then make up for what earlier blocks lost. For each
decoder block: mean x x^T of its linears' inputs is measured on the float block, its weights are quantized, optionally
their rounding is learned for the whole block (`reconstruct`), and the hidden states pass through the block as the
policy runs it, INT8 inputs included.

What the policy decides before (activation tiers, INT8 scales, equalization) comes from the float model and stays.
Linears outside the blocks are quantized last, with the inputs that the quantized blocks give. One that runs before the
blocks stays float for what follows.

In memory are one block, its Hessians, and the hidden states of all windows: twice where rounding is learned, for then
the float model runs beside the quantized one. Hidden states above a limit lie on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from calib.batches import TokenBatches, auto_batch_size
from calib.devices import CPU
from calib.fake_quant import applied_policy, apply_policy
from calib.given import GivenWeights
from calib.hessians import owners_from_sites
from calib.hidden import HiddenStates
from calib.layer_arrays import needs_hessian
from calib.observe import hessians_of_block, hessians_of_rest
from calib.reconstruct import BlockProblem, Start, reconstruct
from calib.stream import BlockStream, LoadModel, blocks_path
from fptq_export.errors import UserError
from fptq_export.packing import int4_from_packed, packed_from_int4
from fptq_export.policy import Policy, SequentialCodes
from fptq_export.progress import Progress, Task
from fptq_export.sites import Sites

__all__ = ["Sequential", "check_sequential_given", "sequential_arrays", "with_sequential_entries"]

Arrays = dict[str, NDArray[Any]]
Quantize = Callable[[str, torch.Tensor | None], Arrays]


@dataclass(frozen=True)
class Sequential:
    """How weights are quantized block by block."""

    load: LoadModel
    """Gives the float model."""
    batches: TokenBatches
    """The calibration text."""
    batch_size: int = 0
    """Windows a forward pass; 0 chooses."""
    device: torch.device = CPU
    """Runs the blocks."""
    reconstruction_steps: int = 0
    """Steps of learned rounding a block; 0 for none."""
    seed: int = 0
    """Of the order in which learned rounding sees the text."""
    max_memory: int | None = None
    """Bytes of hidden states in memory; the rest lies in `spill`."""
    spill: Path | None = None
    """A folder of their own for hidden states above the limit; it is removed."""

    def stream(self, name: str, *, head: bool) -> BlockStream:
        """The text on its way through the blocks; `name` tells streams apart."""
        hidden = HiddenStates()
        if self.max_memory is not None and self.spill is not None:
            folder = self.spill / name
            shutil.rmtree(folder, ignore_errors=True)
            hidden = HiddenStates(lambda blocks: folder / f"after-{blocks}", self.max_memory)
        size = self.batch_size or auto_batch_size(self.batches.tokens.shape[1])
        tokens = torch.from_numpy(self.batches.tokens)
        return BlockStream(self.load, tokens, size, head=head, device=self.device, hidden=hidden)

    def forget(self, name: str, blocks: int) -> None:
        """Remove the hidden states before a block that the stream has passed."""
        if self.spill is not None:
            shutil.rmtree(self.spill / name / f"after-{blocks}", ignore_errors=True)


def sequential_arrays(
    policy: Policy,
    sites: Sites,
    equalization: Mapping[str, NDArray[Any]],
    plan: Sequential,
    quantize: Quantize,
    progress: Progress,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Codes and scales of every quantized layer, in the order of the blocks.

    Args:
        policy: Complete.
        sites: Linears and fold sites.
        equalization: `<site>.equalization` of every equalized site.
        plan: What runs, and where.
        quantize: Gives codes and scales of a linear for mean x x^T of its input, which it may change; None for methods
            that need none.
        progress: Reports layers.

    Yields:
        Names and arrays, as in `policy.safetensors`.

    Raises:
        UserError: No token reaches a linear, an activation is not finite, or what `quantize` raises.
    """
    walk = _Walk(policy, sites, equalization, plan, quantize)
    blocks = range(walk.count)
    total = len(policy.quantized()) + plan.reconstruction_steps * sum(walk.learns(index) for index in blocks)
    unit = "layers and steps" if plan.reconstruction_steps else "layers"
    with progress.task("quantize weights", total, unit=unit) as task:
        for index in blocks:
            yield from walk.block(index, task).items()
        yield from walk.rest(task).items()
    if plan.spill is not None:
        shutil.rmtree(plan.spill, ignore_errors=True)


class _Walk:
    """The quantized model on its way through the blocks, and the float one beside it where rounding is learned."""

    def __init__(
        self,
        policy: Policy,
        sites: Sites,
        equalization: Mapping[str, NDArray[Any]],
        plan: Sequential,
        quantize: Quantize,
    ) -> None:
        self._policy, self._sites, self._plan = policy, sites, plan
        self._equalization = {name: array for name, array in equalization.items() if name.endswith(".equalization")}
        self._quantize = quantize
        base = f"{plan.load().base_model_prefix}."
        head = not all(path.startswith(base) for path in policy.quantized())
        self.stream = plan.stream("quantized", head=head)
        self._float = plan.stream("float", head=False) if plan.reconstruction_steps else None
        quantized = policy.quantized()
        self._prefixes = [f"{self.stream.path}.{index}." for index in range(self.stream.count)]
        self._in_blocks = [[path for path in quantized if path.startswith(prefix)] for prefix in self._prefixes]
        self._outside = [path for path in quantized if not path.startswith(tuple(self._prefixes))]

    @property
    def count(self) -> int:
        """Blocks to run: none after the last one with a quantized linear, if nothing is quantized behind it."""
        if self._outside:
            return self.stream.count
        return max((index + 1 for index, paths in enumerate(self._in_blocks) if paths), default=0)

    def learns(self, index: int) -> bool:
        """Whether a block has rounding that can be learned."""
        return self._float is not None and bool(self._int4(index))

    def block(self, index: int, task: Task) -> Arrays:
        """Quantize one block and let the hidden states pass it."""
        prefix, paths = self._prefixes[index], self._in_blocks[index]
        block = self.stream.load_block(index)
        owners = self._owners(paths)
        found = hessians_of_block(self.stream, index, block, owners, self._plan.batches) if owners else {}
        arrays = self._arrays(paths, owners, found, task)
        if self._float is not None:
            _pass(self._float, index, block)
            self._plan.forget("float", index)
        block.cpu()  # where scales and codes are
        if self._float is not None and self.learns(index):
            arrays |= self._reconstructed(self._float, index, block, arrays, task)
        apply_policy(block, self._policy, self._equalization | arrays, self._sites, prefix=prefix)
        _pass(self.stream, index, block.to(self._plan.device))
        self._plan.forget("quantized", index)
        return arrays

    def rest(self, task: Task) -> Arrays:
        """Quantize what lies outside the blocks; the stream has passed all of them."""
        owners = self._owners(self._outside)
        found = hessians_of_rest(self.stream, owners, self._plan.batches) if owners else {}
        return self._arrays(self._outside, owners, found, task)

    def _int4(self, index: int) -> list[str]:
        return [path for path in self._in_blocks[index] if self._policy.layers[path].group_size is not None]

    def _owners(self, paths: Sequence[str]) -> dict[str, str]:
        """Linears whose method needs the Hessian of the input -> the linear that it is kept under."""
        return owners_from_sites(self._sites, {path for path in paths if needs_hessian(self._policy.layers[path])})

    def _arrays(
        self, paths: Sequence[str], owners: Mapping[str, str], found: Mapping[str, torch.Tensor], task: Task
    ) -> Arrays:
        arrays: Arrays = {}
        for path in paths:
            if path in owners and owners[path] not in found:
                cause = "no token of the calibration text reaches it once the blocks before it are quantized"
                raise UserError(f"layer {path}", cause, "calibrate on more text, or leave --sequential out")
            arrays |= self._quantize(path, found[owners[path]].clone() if path in owners else None)
            task.advance()
        return arrays

    def _reconstructed(
        self, float_model: BlockStream, index: int, block: nn.Module, arrays: Arrays, task: Task
    ) -> Arrays:
        """Better codes for the INT4 layers of a block that the float model has passed already."""
        prefix, paths = self._prefixes[index], self._int4(index)
        with applied_policy(block, self._policy, self._equalization, self._sites, weights="float", prefix=prefix):
            weights = {path: block.get_parameter(f"{path.removeprefix(prefix)}.weight").detach() for path in paths}
        with applied_policy(block, self._policy, self._equalization | arrays, self._sites, prefix=prefix):
            problem = BlockProblem(
                block=block.to(self._plan.device).requires_grad_(False),
                starts={path.removeprefix(prefix): _start(path, weights[path], arrays) for path in paths},
                output=lambda module, batch: self.stream.output(index, module, batch),
                target=float_model.hidden,
                batches=self.stream.batches,
            )
            found = reconstruct(problem, self._plan.reconstruction_steps, self._plan.seed, task)
            block.cpu()
        return {f"{prefix}{path}.weight_codes": packed_from_int4(codes.numpy()) for path, codes in found.codes.items()}


def _start(path: str, weight: torch.Tensor, arrays: Mapping[str, NDArray[Any]]) -> Start:
    codes = torch.from_numpy(int4_from_packed(arrays[f"{path}.weight_codes"]))
    return Start(weight, codes, torch.from_numpy(arrays[f"{path}.weight_scales"]))


def check_sequential_given(given: GivenWeights | None) -> None:
    """Refuse a model that came with INT4 codes. Raises UserError."""
    if given is not None:
        cause = f"the {given.format} checkpoint came with its INT4 codes: there is nothing to quantize"
        raise UserError("--sequential, --reconstruct-blocks", cause, "leave them out, or give the float model")


def with_sequential_entries(policy: Policy, plan: Sequential) -> Policy:
    """Say in the entries of INT4 layers how their codes are made."""
    path = blocks_path(plan.load())
    layers = dict(policy.layers)
    for name, layer in policy.quantized().items():
        if layer.group_size is not None and layer.weight_method is not None:
            steps = plan.reconstruction_steps if name.startswith(f"{path}.") else 0
            entry = SequentialCodes(
                weight_method=layer.weight_method,
                group_size=layer.group_size,
                signed_scales=layer.signed_scales,
                reconstruction_steps=steps,
            )
            layers[name] = layer.model_copy(update={"sequential": entry})
    return policy.model_copy(update={"layers": layers})


def _pass(stream: BlockStream, index: int, block: nn.Module) -> None:
    for _ in stream.advance(index, block):
        pass
