"""`config.json` of a checkpoint, and what the model is by it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from calib.quiet import quiet_transformers
from fptq_export.errors import UserError
from fptq_export.tasks import (
    CAUSAL_LM,
    ENCODER,
    SEQ2SEQ_DECODER,
    SEQ2SEQ_ENCODER,
    VLM_DECODER,
    Task,
    has_halves,
    task_from_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["CONFIG_FILE", "MODEL_ERRORS", "changed_config", "config_hint", "first_line", "read_config", "task_of_model"]

CONFIG_FILE = "config.json"

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


_NAMES: Mapping[Task, str] = {
    CAUSAL_LM: "causal language model",
    ENCODER: "encoder",
    SEQ2SEQ_ENCODER: "encoder-decoder from text or mel features to text",
    SEQ2SEQ_DECODER: "encoder-decoder from text or mel features to text",
    VLM_DECODER: "model from images and text to text",
}


def read_config(directory: Path, trust_remote_code: bool, quantized: bool) -> PreTrainedConfig:
    """`config.json` of a model; with `quantized` also one that describes quantized weights.

    Raises:
        UserError: It is missing or unreadable, or not of a model that this tool can quantize.
    """
    file = directory / CONFIG_FILE
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
    return config


def changed_config(directory: Path, **changes: object) -> str:
    """`config.json` of a model whose weights are written anew in float32, as text.

    Args:
        directory: Holds the file.
        changes: Other entries that change, also in the config of the text model that a config may contain.
    """
    raw = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    raw.pop("torch_dtype", None)
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict):
            part.update(dtype="float32", **changes)
    return json.dumps(raw, indent=1, sort_keys=True) + "\n"


def task_of_model(config: PreTrainedConfig, wanted: Task | None, directory: Path, *, trust_remote_code: bool) -> Task:
    """What a model is opened as: as wanted, else as its config says.

    Raises:
        UserError: transformers has no such model.
    """
    task = task_from_config(config, wanted, trust_remote_code=trust_remote_code)
    if task is not None:
        return task
    where = str(directory / CONFIG_FILE)
    if wanted is None and config.is_encoder_decoder:
        kind = f"model_type {config.model_type!r} is an encoder-decoder"
        if has_halves(config):
            hint = "name one of them: --task seq2seq-encoder or --task seq2seq-decoder"
            raise UserError(where, f"{kind}, which is two graphs and no single one", hint)
        hint = "give one that does (T5, BART, Whisper, ...), a language model or an encoder"
        raise UserError(where, f"{kind} that turns neither text nor windows of mel features into text", hint)
    missing = "causal language model and no encoder" if wanted is None else _NAMES[wanted]
    raise UserError(
        where,
        f"transformers has no {missing} for model_type {config.model_type!r}",
        "give a language model, an encoder, or an encoder-decoder like T5",
    )


def config_hint(error: Exception) -> str:
    """What to do about an error of a config."""
    if "trust_remote_code" in str(error):
        return "the model needs Python code of its own: read it, then pass --trust-remote-code"
    return "mend config.json, or download the checkpoint again"


def first_line(error: Exception) -> str:
    """Kind and beginning of an error, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
