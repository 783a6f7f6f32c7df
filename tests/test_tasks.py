"""Which models are encoders and which are causal language models: by config, never by a list of families."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from fptq_export.tasks import (
    CAUSAL_LM,
    ENCODER,
    SEQ2SEQ_DECODER,
    SEQ2SEQ_ENCODER,
    VLM_DECODER,
    Task,
    build_options,
    has_halves,
    task_from_config,
)

CASES: dict[str, tuple[str, dict[str, Any], Task | None]] = {
    "bare encoder": ("BertConfig", {"architectures": ["BertModel"]}, ENCODER),
    "masked LM": ("EsmConfig", {"architectures": ["EsmForMaskedLM"]}, ENCODER),
    "classifier on an encoder": ("RobertaConfig", {"architectures": ["RobertaForSequenceClassification"]}, ENCODER),
    "encoder that names no class": ("BertConfig", {}, ENCODER),
    "decoder": ("LlamaConfig", {"architectures": ["LlamaForCausalLM"]}, CAUSAL_LM),
    "decoder that names no class": ("OPTConfig", {}, CAUSAL_LM),
    "bare decoder": ("LlamaConfig", {"architectures": ["LlamaModel"]}, CAUSAL_LM),
    "causal class of an encoder's type": ("BertConfig", {"architectures": ["BertLMHeadModel"]}, CAUSAL_LM),
    "encoder's type as a decoder": ("BertConfig", {"is_decoder": True}, CAUSAL_LM),
    "decoder half of an encoder-decoder": ("BartConfig", {"architectures": ["BartForCausalLM"]}, CAUSAL_LM),
    "encoder-decoder": ("T5Config", {}, None),
    "encoder-decoder whose type has a decoder of its own": ("BartConfig", {}, None),
    "encoder-decoder of speech": ("WhisperConfig", {}, None),
    "images": ("ViTConfig", {}, None),
    "images and text": ("LlavaConfig", {"architectures": ["LlavaForConditionalGeneration"]}, VLM_DECODER),
    "images and text, with a causal class that is the same": ("Gemma3Config", {}, VLM_DECODER),
    "text alone of a type that sees": ("Gemma3TextConfig", {}, CAUSAL_LM),
}


@pytest.mark.parametrize("case", CASES)
def test_a_config_says_what_its_model_is(case: str) -> None:
    """The class it names, else the classes transformers has for its type."""
    name, arguments, task = CASES[case]
    assert task_from_config(getattr(transformers, name)(**arguments)) == task


@pytest.mark.parametrize(
    ("name", "wanted", "task"),
    [
        ("LlamaConfig", ENCODER, ENCODER),
        ("BertConfig", CAUSAL_LM, CAUSAL_LM),
        ("EsmConfig", CAUSAL_LM, None),
        ("T5Config", ENCODER, None),
        ("T5Config", SEQ2SEQ_ENCODER, SEQ2SEQ_ENCODER),
        ("T5Config", SEQ2SEQ_DECODER, SEQ2SEQ_DECODER),
        ("LlamaConfig", SEQ2SEQ_DECODER, None),
        ("WhisperConfig", SEQ2SEQ_DECODER, SEQ2SEQ_DECODER),
        ("Speech2TextConfig", SEQ2SEQ_DECODER, None),
        ("LlavaConfig", VLM_DECODER, VLM_DECODER),
        ("LlavaConfig", CAUSAL_LM, None),
        ("LlamaConfig", VLM_DECODER, None),
    ],
)
def test_a_wanted_task_is_taken_where_there_is_a_class(name: str, wanted: Task, task: Task | None) -> None:
    """The body of a decoder is an encoder too; what transformers cannot build is not promised."""
    assert task_from_config(getattr(transformers, name)(), wanted) == task


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [
        ("BertConfig", ENCODER, {"add_pooling_layer": False}),
        ("DistilBertConfig", ENCODER, {}),
        ("LlamaConfig", ENCODER, {}),
        ("BertConfig", CAUSAL_LM, {}),
    ],
)
def test_only_models_that_have_a_pooler_are_built_without_it(name: str, task: Task, options: dict[str, Any]) -> None:
    """The option is given to classes that take it."""
    assert build_options(getattr(transformers, name)(), task) == options


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("T5Config", {}, True),
        ("BartConfig", {"architectures": ["BartForConditionalGeneration"]}, True),
        ("BartConfig", {"architectures": ["BartForCausalLM"]}, False),
        ("T5Config", {"is_encoder_decoder": False}, False),
        ("LlamaConfig", {}, False),
        ("WhisperConfig", {}, True),
        ("WhisperConfig", {"architectures": ["WhisperForCausalLM"]}, False),
        ("Speech2TextConfig", {}, False),
        ("SpeechT5Config", {}, False),
        ("MoonshineConfig", {}, False),
    ],
)
def test_an_encoder_decoder_of_text_or_features_has_two_halves(
    name: str, arguments: dict[str, Any], expected: bool
) -> None:
    """The decoder of one alone has not, nor one that reads waves, or frames of any number."""
    assert has_halves(getattr(transformers, name)(**arguments)) is expected
