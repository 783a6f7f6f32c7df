"""`adapter_config.json` and the tensors of an adapter: headers only, no data read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.tensor_files import TensorEntry, tensor_entries_from_files
from fptq_export.errors import Problem, UserError, UserErrors

__all__ = ["MERGE_WITH_PEFT", "Adapter", "LoraPair", "adapter_from_directory"]

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
MERGE_WITH_PEFT = "merge it with peft (merge_and_unload, save_pretrained) and give the merged model without --adapter"

_MATRIX_RANK = 2
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"})
_WITHOUT_EFFECT = frozenset(
    {
        *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
        *("fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
"""Settings that say which linears were trained and how; the tensors say the first, and nothing is trained here. The
last four belong to values of `init_lora_weights` that are refused."""
_OFF: tuple[Any, ...] = (None, False, "none", [], {})
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
"""Those that leave the base weights as they are; peft changes them while it loads an adapter of another one."""


@dataclass(frozen=True)
class LoraPair:
    """What is added to one linear: scaling B A."""

    module: str
    """Path of the linear in the model that was trained."""
    a: TensorEntry
    """[r, in]."""
    b: TensorEntry
    """[out, r]."""
    scaling: float
    """alpha / r, or alpha / sqrt(r) with rank-stabilised scaling."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk."""

    directory: Path
    base: str
    """What it says its base model is called."""
    pairs: tuple[LoraPair, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that it was read from."""
        return self.directory / _CONFIG, self.directory / _TENSORS


def adapter_from_directory(directory: Path) -> Adapter:
    """Open an adapter.

    Raises:
        UserError: A file is missing or damaged, or the weights are pickled.
        UserErrors: It is more than a sum of two matrices, or its tensors are not those of its config; all at once.
    """
    config = _read_config(directory / _CONFIG)
    problems = list(_config_problems(config))
    if problems:
        raise UserErrors(str(directory / _CONFIG), problems, MERGE_WITH_PEFT)
    if not (directory / _TENSORS).is_file():
        if (directory / _PICKLE).is_file():
            cause = "the weights are pickled, and opening a pickle runs code from it"
            raise UserError(str(directory / _PICKLE), cause, "save the adapter again with peft: save_pretrained")
        raise UserError(str(directory / _TENSORS), "no such file", "give a directory that peft has saved")
    entries = tensor_entries_from_files([directory / _TENSORS])
    problems = list(_tensor_problems(entries, config))
    if problems:
        raise UserErrors(str(directory / _TENSORS), problems, MERGE_WITH_PEFT)
    modules = dict.fromkeys(match["module"] for key in entries if (match := _TENSOR.fullmatch(key)))
    pairs = tuple(
        LoraPair(module, entries[_key(module, "A")], entries[_key(module, "B")], _scaling(module, config))
        for module in modules
    )
    return Adapter(directory, str(config.get("base_model_name_or_path") or "its own base model"), pairs)


def _read_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        cause = "no such directory" if not file.parent.is_dir() else f"holds no {_CONFIG}"
        raise UserError(f"--adapter {file.parent}", cause, "give a directory that peft has saved")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(file), f"not readable JSON ({error})", "copy the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(str(file), "not a JSON object", "copy the adapter again")
    return config


def _config_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    if config.get("peft_type") != "LORA":
        yield Problem("$.peft_type", f"is {config.get('peft_type')!r}; only LORA is merged")
        return
    if config.get("init_lora_weights", True) not in _INITIALIZATIONS:
        message = f"is {config['init_lora_weights']!r}, which changes the base weights when the adapter is loaded"
        yield Problem("$.init_lora_weights", message)
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            yield Problem(f"$.{key}", f"is {config.get(key)!r}, not a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_positive, pattern.values())):
            yield Problem(f"$.{key}", "does not map names of modules to positive numbers")
        else:
            yield from _pattern_problems(key, pattern)
    for key, value in config.items():
        if key not in _READ | _WITHOUT_EFFECT and value not in _OFF:
            yield Problem(f"$.{key}", f"is {value!r}, and a sum of two matrices is all that is merged")


def _pattern_problems(key: str, pattern: Mapping[str, Any]) -> Iterator[Problem]:
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            yield Problem(f'$.{key}["{name}"]', f"not a regular expression ({error})")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _tensor_problems(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Iterator[Problem]:
    for key, entry in entries.items():
        match = _TENSOR.fullmatch(key)
        path = f'$["{key}"]'
        if match is None:
            yield Problem(path, "is neither A nor B of a linear")
            continue
        module, side = match["module"], match["side"]
        if _key(module, "B" if side == "A" else "A") not in entries:
            yield Problem(path, "has no partner")
        rank = _of_module(config["r"], config.get("rank_pattern"), module)
        axis = 0 if side == "A" else 1
        if len(entry.shape) != _MATRIX_RANK or entry.shape[axis] != rank:
            yield Problem(path, f"has shape {list(entry.shape)}, and {_CONFIG} gives it the rank {rank}")


def _key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _scaling(module: str, config: Mapping[str, Any]) -> float:
    rank = _of_module(config["r"], config.get("rank_pattern"), module)
    alpha = _of_module(config["lora_alpha"], config.get("alpha_pattern"), module)
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_module(default: Any, pattern: Mapping[str, Any] | None, module: str) -> Any:
    """The value of the first name that the end of the path matches, as peft looks it up."""
    values = (value for name, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({name})", module))
    return next(values, default)
