"""What a model is exported as: a causal language model with a cache, or an encoder that gives hidden states.

An encoder-decoder is exported as its two halves, a graph each: an encoder of text or speech, and a decoder that reads
what the encoder gives. A vision-language model is exported as its language half, a decoder that reads embeddings. Which
of these a checkpoint is follows from its config and from transformers' own mappings; there is no list of families here.
transformers is imported by the functions, not by the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeGuard

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "CAUSAL_LM",
    "ENCODER",
    "HALF_DIRECTORIES",
    "SEQ2SEQ",
    "SEQ2SEQ_DECODER",
    "SEQ2SEQ_ENCODER",
    "VLM_DECODER",
    "Half",
    "Task",
    "auto_class",
    "build_options",
    "gives_hidden_states",
    "has_halves",
    "is_half",
    "reads_features",
    "task_from_config",
]

Half = Literal["seq2seq-encoder", "seq2seq-decoder"]
Task = Literal["causal-lm", "encoder", "vlm-decoder"] | Half
CAUSAL_LM: Final = "causal-lm"
ENCODER: Final = "encoder"
SEQ2SEQ: Final = "seq2seq"
"""Both halves of an encoder-decoder: no task of its own, since it is no single graph."""
SEQ2SEQ_ENCODER: Final = "seq2seq-encoder"
SEQ2SEQ_DECODER: Final = "seq2seq-decoder"
VLM_DECODER: Final = "vlm-decoder"
"""The language half of a vision-language model, behind its embeddings."""
HALF_DIRECTORIES: Mapping[Half, str] = {SEQ2SEQ_ENCODER: "encoder", SEQ2SEQ_DECODER: "decoder"}
"""Each half -> the folder of its run, in the order in which they run."""


def task_from_config(
    config: PreTrainedConfig, wanted: Task | None = None, *, trust_remote_code: bool = False
) -> Task | None:
    """What a model is.

    Rules, the first that holds:
        1. A wanted task is taken where transformers, or trusted code of the model, has a class for it. An encoder is
           then the body of any model that is not an encoder-decoder, a decoder's too.
        2. The type has one class, from images and text to text, that also stands for its causal one: its language half.
        3. The config names its class and that is the causal one of its type: a causal language model.
        4. The type has a masked language model and is neither a decoder nor an encoder-decoder: an encoder.
        5. The type has a causal language model and is no encoder-decoder.
        6. The type has a model from images and text to text, and is no encoder-decoder: its language half.

    Returns:
        None where no rule holds: for an encoder-decoder, which is no single graph (`has_halves`), among others.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_MAPPING,
    )

    remote = getattr(config, "auto_map", {}) if trust_remote_code else {}
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING or "AutoModelForMaskedLM" in remote
    if wanted == CAUSAL_LM:
        return CAUSAL_LM if causal else None
    if wanted == ENCODER:
        has_body = kind in MODEL_MAPPING or "AutoModel" in remote
        return ENCODER if has_body and not config.is_encoder_decoder else None
    sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not config.is_encoder_decoder
    if wanted == VLM_DECODER:
        return VLM_DECODER if sees else None
    if wanted is not None:
        return wanted if has_halves(config) else None
    if sees and causal and MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None) is MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]:
        return VLM_DECODER
    if _names_causal_class(config):
        return CAUSAL_LM
    if config.is_encoder_decoder:
        return None
    if masked and not getattr(config, "is_decoder", False):
        return ENCODER
    if causal:
        return CAUSAL_LM
    return VLM_DECODER if sees else None


def has_halves(config: PreTrainedConfig) -> bool:
    """Whether a model is an encoder-decoder from text or features (T5, BART, Whisper), and no decoder of one alone."""
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    known = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING or reads_features(config)
    return known and bool(config.is_encoder_decoder) and not _names_causal_class(config)


def reads_features(config: PreTrainedConfig) -> bool:
    """Whether an encoder-decoder turns speech into text, from windows of a fixed number of mel frames, as Whisper does.

    Models that take frames of any number behind a mask, or raw waves, are no such ones.
    """
    from transformers import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING

    model_class: Any = MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING.get(type(config), None)
    fixed = all(hasattr(config, name) for name in ("num_mel_bins", "max_source_positions", "max_target_positions"))
    return fixed and getattr(model_class, "main_input_name", None) == "input_features"


def is_half(task: str | None) -> TypeGuard[Half]:
    """Whether a task is one of the two graphs of an encoder-decoder."""
    return task in HALF_DIRECTORIES


def gives_hidden_states(task: Task) -> bool:
    """Whether the graph of a task is an encoder: tokens to hidden states, without a cache."""
    return task in (ENCODER, SEQ2SEQ_ENCODER)


def auto_class(config: PreTrainedConfig, task: Task) -> Any:
    """The class of transformers that builds and loads models of a task; of a half, the whole model."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )

    if is_half(task):
        return AutoModelForSpeechSeq2Seq if reads_features(config) else AutoModelForSeq2SeqLM
    if task == VLM_DECODER:
        return AutoModelForImageTextToText
    return AutoModel if task == ENCODER else AutoModelForCausalLM


def build_options(config: PreTrainedConfig, task: Task) -> dict[str, Any]:
    """What `auto_class` has to be told: an encoder's hidden states do not depend on its pooler, so it gets none."""
    from transformers import MODEL_MAPPING

    if task != ENCODER or type(config) not in MODEL_MAPPING:
        return {}
    model_class: Any = MODEL_MAPPING[type(config)]
    if isinstance(model_class, tuple):
        return {}
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def _names_causal_class(config: PreTrainedConfig) -> bool:
    """Whether the class that a config names is the causal one of its type."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return causal_class is not None and causal_class.__name__ in (config.architectures or ())
