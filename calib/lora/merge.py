"""A base model with an adapter merged, as a Hugging Face directory: one weight in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from calib.linears import linears_from_model, weight_from_linear
from calib.load import Checkpoint, skeleton_from_checkpoint
from calib.lora.adapter import MERGE_WITH_PEFT, Adapter, LoraPair
from calib.model_config import CONFIG_FILE, changed_config
from calib.tensor_files import WEIGHTS_FILE, TensorEntry, tensor_entries_from_directory
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.files import write_text
from fptq_export.progress import Progress
from fptq_export.tensor_writer import TensorSpec, tensor_writer

__all__ = ["check_merge", "write_merged"]

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""All others are masks and counters of old checkpoints, which models compute themselves."""


@dataclass(frozen=True)
class _Change:
    """What is added to one stored weight."""

    pair: LoraPair
    transposed: bool
    """The weight is stored [in, out], as that of GPT-2's `Conv1D`."""


@dataclass(frozen=True)
class _Base:
    """The linears of the base model, on the meta device."""

    linears: Mapping[str, nn.Module]
    prefix: str
    """Of the body's modules in the model with its head."""
    tied: frozenset[str]
    """Parameters that share their storage with another."""

    def path_of(self, module: str) -> str | None:
        """The linear that an adapter calls `module`.

        An adapter of the body alone leaves its prefix out; one of the model with its head has it, also where the body
        is exported.
        """
        paths = (module, f"{self.prefix}.{module}", module.removeprefix(f"{self.prefix}."))
        return next((path for path in paths if path in self.linears), None)


def check_merge(base: Checkpoint, adapter: Adapter) -> None:
    """Refuse an adapter that does not fit the base model. Reads no weight.

    Raises:
        UserError: The base model came with INT4 codes.
        UserErrors: The base model lacks linears of the adapter, or has them in other shapes; all at once.
    """
    _changes(base, adapter)


def write_merged(
    base: Checkpoint, adapter: Adapter, directory: Path, copies: Iterable[Path], progress: Progress
) -> dict[str, int]:
    """Write the merged model; `config.json` comes last.

    Everything is stored in float32, under the names of the base model's files: W + scaling B A rounded to FP16 again
    would lose what is below half a step of W, and a model of two types would be loaded in one of them.

    Args:
        base: The float model.
        adapter: Of this model.
        directory: Where config, weights (4 bytes each) and copies go.
        copies: Files that belong to the model too: those of its tokenizer.
        progress: Reports tensors.

    Returns:
        How many linears were changed, for the summary.

    Raises:
        UserError: As `check_merge`; or a merged weight is not finite.
    """
    changes = _changes(base, adapter)
    entries = tensor_entries_from_directory(base.directory)
    specs = {key: TensorSpec.of("float32", *entry.shape) for key, entry in entries.items() if entry.dtype in _FLOATS}
    with (
        tensor_writer(directory / WEIGHTS_FILE, specs, {"format": "pt"}) as writer,
        progress.task("merge", len(specs), unit="tensors") as task,
    ):
        for key in specs:
            change = changes.get(key)
            tensor = _read(entries[key]) if change is None else _merged(entries[key], change)
            writer.write(key, tensor.numpy())
            task.advance()
    for path in copies:
        shutil.copyfile(path, directory / path.name)
    write_text(changed_config(base.directory), directory / CONFIG_FILE)
    return {"merged": len(changes)}


def _merged(entry: TensorEntry, change: _Change) -> torch.Tensor:
    """W + scaling B A, float32, in the layout that W is stored in."""
    a, b = (_read(part) for part in (change.pair.a, change.pair.b))
    delta = (b @ a) * change.pair.scaling
    merged = _read(entry) + (delta.T if change.transposed else delta)
    if not merged.isfinite().all():
        cause = "its merged weight holds NaN or Inf"
        raise UserError(f"--adapter: {change.pair.module}", cause, "fetch the adapter again, or train it anew")
    return merged


def _read(entry: TensorEntry) -> torch.Tensor:
    with safe_open(str(entry.file), framework="pt") as tensors:
        return entry.read_from(tensors).to(torch.float32)


def _changes(base: Checkpoint, adapter: Adapter) -> dict[str, _Change]:
    """Name of a stored weight -> what is added to it."""
    if base.given is not None:
        cause = f"the model came with INT4 codes ({base.given.format}), which belong to the weights as they are"
        raise UserError("--adapter", cause, "give the float model, or leave --adapter out")
    skeleton = skeleton_from_checkpoint(base)
    tied = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    model = _Base(linears_from_model(skeleton), skeleton.base_model_prefix, frozenset(tied) | frozenset(tied.values()))
    found = ((pair, _problem(pair, base, model)) for pair in adapter.pairs)
    problems = [Problem(f"$.{pair.module}", problem) for pair, problem in found if problem is not None]
    if problems:
        hint = f"give the model that the adapter was trained on ({adapter.base}), or {MERGE_WITH_PEFT}"
        raise UserErrors(f"--adapter {adapter.directory}", problems, hint)
    changes = {}
    for pair in adapter.pairs:
        path = str(model.path_of(pair.module))
        changes[base.tensors[f"{path}.weight"].key] = _Change(pair, _is_transposed(model.linears[path]))
    return changes


def _problem(pair: LoraPair, base: Checkpoint, model: _Base) -> str | None:
    """Why a pair cannot be merged; None where it can."""
    path = model.path_of(pair.module)
    if path is None:
        return f"{base.name} has no linear of this name"
    shape = tuple(weight_from_linear(model.linears[path]).shape)
    if shape != pair.shape:
        return f"is made for a weight of {list(pair.shape)}, and that of {base.name} is {list(shape)}"
    if f"{path}.weight" in model.tied:
        return "its weight is tied to another one, which would change with it"
    stored = base.tensors.get(f"{path}.weight")
    return None if stored is not None and stored.rows is None else f"{base.name} does not store its weight on its own"


def _is_transposed(linear: nn.Module) -> bool:
    return not isinstance(linear, nn.Linear)
