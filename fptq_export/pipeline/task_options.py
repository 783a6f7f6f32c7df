"""Options that belong to one kind of model, refused for the other; and lengths that a model does not take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.sites import Sites
from fptq_export.tasks import CAUSAL_LM, ENCODER, SEQ2SEQ, SEQ2SEQ_DECODER, SEQ2SEQ_ENCODER, VLM_DECODER, Half, Task

__all__ = ["check_cache", "check_length", "check_task_options", "options_for_half", "wanted_task"]

_OF_DECODERS = {
    "max_ppl_increase": "an encoder predicts no next token; use --min-cosine",
    "eval_windows": "an encoder is compared on texts; use --eval-sentences",
    "decode_steps": "an encoder does not decode",
    "max_kv_len": "an encoder has no cache",
}
_OF_ENCODERS = {
    "min_cosine": "a causal language model has no text embedding; use --max-ppl-increase",
    "eval_text": "verification reads built-in text; fptq-export eval takes --text",
    "eval_sentences": "a causal language model is compared on windows; use --eval-windows",
}
_NOT_FOR_ENCODERS = {
    "rotate": "encoders are not rotated",
    "kv_cache": "an encoder has no cache",
    "kv_dtype": "an encoder has no cache",
    "logits": "an encoder has no logits",
    "checkpoint": "checkpoints are written of causal language models only",
    "reconstruct_blocks": "its loss would count padding; use --sequential",
}
_NOT_FOR_HALVES = {
    "adapter": "it may belong to both halves; merge it with peft, and give the merged model",
    "rotate": "only causal language models are rotated",
    "kv_cache": "its cache grows with every call",
    "kv_dtype": "its cache has the type of the graph",
    "logits": "it gives the logits of every token of a call",
    "checkpoint": "checkpoints are written of causal language models only",
    "sequential": "only causal language models and encoders are quantized block by block",
    "reconstruct_blocks": "only causal language models are quantized block by block",
}
_NOT_FOR_LANGUAGE_HALVES = {
    "adapter": "it may belong to the vision tower too; merge it with peft, and give the merged model",
    "rotate": "embeddings of images would have to be rotated as well",
    "checkpoint": "checkpoints are written of causal language models only",
}
_REFUSED: Mapping[Task, Mapping[str, str]] = {
    CAUSAL_LM: _OF_ENCODERS,
    ENCODER: {**_NOT_FOR_ENCODERS, **_OF_DECODERS},
    SEQ2SEQ_ENCODER: {**_NOT_FOR_HALVES, **_NOT_FOR_ENCODERS, **_OF_DECODERS},
    SEQ2SEQ_DECODER: {**_NOT_FOR_HALVES, **_OF_ENCODERS},
    VLM_DECODER: {**_NOT_FOR_LANGUAGE_HALVES, **_OF_ENCODERS},
}
_NAMES: Mapping[Task, str] = {
    CAUSAL_LM: "a causal language model",
    ENCODER: "an encoder",
    SEQ2SEQ_ENCODER: "the encoder of an encoder-decoder",
    SEQ2SEQ_DECODER: "the decoder of an encoder-decoder",
    VLM_DECODER: "the language half of a vision-language model",
}


def wanted_task(options: RunOptions) -> Task | None:
    """What `--task` asks for; None leaves it to the model's config."""
    return None if options.task == "auto" or options.task == SEQ2SEQ else options.task


def options_for_half(options: RunOptions, half: Half) -> RunOptions:
    """Options for an encoder-decoder without those that concern its other half only."""
    others = _OF_DECODERS if half == SEQ2SEQ_ENCODER else _OF_ENCODERS
    return options.model_copy(update={name: RunOptions.model_fields[name].default for name in others})


def check_task_options(options: RunOptions, task: Task) -> None:
    """Refuse options that mean nothing for a kind of model; what has its default counts as not given.

    Raises:
        UserError: Names the option and says why.
    """
    for name, cause in _REFUSED[task].items():
        if getattr(options, name) != RunOptions.model_fields[name].default:
            cause = f"given for {_NAMES[task]}: {cause}"
            raise UserError(f"--{name.replace('_', '-')}", cause, "leave it out")
    if task != CAUSAL_LM and options.policy == "auto":
        cause = f"weighs errors by what they do to the tokens of a causal language model, and this is {_NAMES[task]}"
        raise UserError("--policy auto", cause, "use the paper's rule, with --equalizer search for accuracy")
    if options.eval_text == "random":
        hint = "give builtin, a .txt, .jsonl or .npz file, or the id of a data set"
        raise UserError("--eval-text random", "random tokens are no text to compare embeddings of", hint)


def check_cache(inputs: Sequence[str]) -> None:
    """Refuse `--max-kv-len` for a graph without a cache.

    Args:
        inputs: Names of the graph's inputs.

    Raises:
        UserError: None of them is a cache.
    """
    if not any(name.startswith("past_key_values.") for name in inputs):
        raise UserError("--max-kv-len", "the graph has no cache", "leave it out")


def check_length(option: str, tokens: int, sites: Sites) -> None:
    """Refuse texts that are longer than the graph's table of positions.

    Raises:
        UserError: Names both lengths.
    """
    if sites.max_sequence is not None and tokens > sites.max_sequence:
        cause = f"is {tokens}, and the model takes {sites.max_sequence} tokens at most"
        raise UserError(option, cause, f"give {option} {sites.max_sequence}, or less")
