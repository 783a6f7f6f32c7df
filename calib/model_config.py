"""`config.json` of a checkpoint, and what it says of the names of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from calib.quiet import quiet_transformers
from calib.tensor_files import TensorEntry
from fptq_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["MODEL_ERRORS", "config_hint", "first_line", "read_config", "with_base_model_prefix"]

MODEL_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    OSError,
    StrictDataclassError,
)
"""What transformers raises for a config that it cannot read or build; the errors have no common base."""


def read_config(directory: Path, trust_remote_code: bool, quantized: bool) -> PreTrainedConfig:
    """`config.json` of a causal language model; with `quantized` also one that describes quantized weights.

    Raises:
        UserError: It is missing or unreadable, or not of a model that this tool can quantize.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(str(file), "no such file", "give the directory that holds config.json and the weights")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except MODEL_ERRORS as error:
        raise UserError(str(file), f"not a usable model config ({first_line(error)})", config_hint(error)) from error
    if quantized:
        # The model that the config describes is the float one.
        vars(config).pop("quantization_config", None)
    elif raw.get("quantization_config") is not None:
        raise UserError(str(file), "the weights are already quantized", "give the original FP16, BF16 or FP32 model")
    if raw.get("transformers_weights") is not None:
        cause = "it names its weight file (transformers_weights), which would bypass the checks"
        raise UserError(str(file), cause, "rename that file to model.safetensors and remove the entry")
    remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        cause = f"transformers has no causal language model for model_type {config.model_type!r}"
        raise UserError(str(file), cause, "give a decoder-only language model")
    return config


def config_hint(error: Exception) -> str:
    """What to do about an error of a config."""
    if "trust_remote_code" in str(error):
        return "the model needs Python code of its own: read it, then pass --trust-remote-code"
    return "mend config.json, or download the checkpoint again"


def first_line(error: Exception) -> str:
    """Kind and beginning of an error, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def with_base_model_prefix(entries: Mapping[str, TensorEntry], config: PreTrainedConfig) -> dict[str, TensorEntry]:
    """Name tensors as the causal LM does: checkpoints saved from the bare model leave its prefix out."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return dict(entries)
    model_type: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    prefix = f"{model_type.base_model_prefix}."
    if any(name.startswith(prefix) for name in entries):
        return dict(entries)
    return {prefix + name: entry for name, entry in entries.items()}
