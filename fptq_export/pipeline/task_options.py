"""Options that belong to one kind of model, refused for the other; and lengths that a model does not take."""

from __future__ import annotations

from collections.abc import Sequence

from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.sites import Sites
from fptq_export.tasks import ENCODER, Task

__all__ = ["check_cache", "check_length", "check_task_options", "wanted_task"]

_OF_CAUSAL_LMS = {
    "rotate": "encoders are not rotated",
    "max_ppl_increase": "an encoder predicts no next token; use --min-cosine",
    "eval_windows": "an encoder is compared on texts; use --eval-sentences",
    "decode_steps": "an encoder does not decode",
    "max_kv_len": "an encoder has no cache",
    "kv_cache": "an encoder has no cache",
    "kv_dtype": "an encoder has no cache",
    "logits": "an encoder has no logits",
    "checkpoint": "checkpoints are written of causal language models only",
    "reconstruct_blocks": "its loss would count padding; use --sequential",
}
_OF_ENCODERS = {
    "min_cosine": "a causal language model has no text embedding; use --max-ppl-increase",
    "eval_text": "verification reads built-in text; fptq-export eval takes --text",
    "eval_sentences": "a causal language model is compared on windows; use --eval-windows",
}


def wanted_task(options: RunOptions) -> Task | None:
    """What `--task` asks for; None leaves it to the model's config."""
    return None if options.task == "auto" else options.task


def check_task_options(options: RunOptions, task: Task) -> None:
    """Refuse options that mean nothing for a kind of model; what has its default counts as not given.

    Raises:
        UserError: Names the option and says why.
    """
    for name, cause in (_OF_CAUSAL_LMS if task == ENCODER else _OF_ENCODERS).items():
        if getattr(options, name) != RunOptions.model_fields[name].default:
            model = "an encoder" if task == ENCODER else "a causal language model"
            raise UserError(f"--{name.replace('_', '-')}", f"given for {model}: {cause}", "leave it out")
    if task == ENCODER and options.policy == "auto":
        cause = "weighs errors by what they do to predicted tokens, and an encoder predicts none"
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
