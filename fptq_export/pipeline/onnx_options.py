"""Options of a run whose MODEL is an ONNX graph, and those that mean nothing there: all refused at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fptq_export.errors import Problem, UserErrors
from fptq_export.options import RunOptions

__all__ = ["MEANINGLESS", "check_onnx_options", "is_onnx_model"]

_SUFFIX = ".onnx"
MEANINGLESS = {
    "task": "a graph has the inputs and outputs it has",
    "dtype": "a graph keeps its own types: export it in the type you want",
    "logits": "a graph has the outputs it has",
    "kv_cache": "a graph has the inputs it has",
    "kv_dtype": "a graph has the inputs it has",
    "adapter": "merge it into the model before the graph is exported",
    "rotate": "graphs are not rotated",
    "trust_remote_code": "a graph brings no code",
    "effective_bits": "is for --policy auto, which weighs predicted tokens",
    "max_dynamic_layers": "is for --policy auto, which weighs predicted tokens",
    "cost_table": "is for --policy auto, which weighs predicted tokens",
    "sequential": "a graph has no blocks that could be run one by one",
    "reconstruct_blocks": "a graph has no blocks that could be run one by one",
    "signed_scales": "is for models from Hugging Face",
    "range_calibrator": "needs histograms, which are not collected for graphs",
    "percentile": "needs histograms, which are not collected for graphs",
    "calib_dataset": "a graph is calibrated on arrays: use --calib-data",
    "calib_size": "all of --calib-data is used",
    "calib_seq": "all of --calib-data is used",
    "seed": "nothing is drawn at random",
    "device": "ONNX Runtime calibrates on the CPU",
    "max_memory": "one batch is in memory at a time: make batches smaller",
    "eval_windows": "a graph is compared on arrays: use --eval-data",
    "eval_seq": "a graph is compared on arrays: use --eval-data",
    "eval_text": "a graph is compared on arrays: use --eval-data",
    "eval_sentences": "a graph is compared on arrays: use --eval-data",
    "decode_steps": "a graph does not decode",
    "max_ppl_increase": "a graph has no perplexity: use --min-cosine",
    "checkpoint": "checkpoints are written of causal language models only",
    "checkpoint_format": "checkpoints are written of causal language models only",
    "checkpoint_per_token": "checkpoints are written of causal language models only",
}
"""Option -> why it means nothing for a graph."""


def is_onnx_model(options: RunOptions) -> bool:
    """Whether MODEL is an ONNX graph."""
    return Path(options.model).suffix == _SUFFIX


def check_onnx_options(options: RunOptions, stages: tuple[str, ...], processes: int) -> None:
    """Refuse options that mean nothing for a graph; what has its default counts as not given.

    Args:
        options: Each of them valid on its own.
        stages: The stages of the verb.
        processes: How many of them were started together.

    Raises:
        UserErrors: Names every such option, and data that is missing.
    """
    problems = [*_meaningless(options), *_missing(options, stages)]
    if processes > 1:
        problems.append(Problem(f"torchrun with {processes} processes", "graphs are calibrated in one"))
    if problems:
        hint = "fptq-export model.onnx --calib-data inputs.npz -o run --engine out.plan is a whole command"
        raise UserErrors(f"options for the ONNX model {options.model}", problems, hint)


def _meaningless(options: RunOptions) -> Iterator[Problem]:
    for name, cause in MEANINGLESS.items():
        if getattr(options, name) != RunOptions.model_fields[name].default:
            yield Problem(_option(name), cause)
    if options.policy == "auto":
        yield Problem("--policy auto", "weighs errors by what they do to predicted tokens, and a graph predicts none")


def _missing(options: RunOptions, stages: tuple[str, ...]) -> Iterator[Problem]:
    if options.calib_data is not None:
        return
    if "calibrate" in stages and options.policy in ("paper", "auto"):
        yield Problem("--calib-data", "is missing: a .npz file with an array for each input, or a directory of them")
    elif "verify" in stages and options.verify and options.eval_data is None:
        yield Problem("--eval-data", "is missing, and so is --calib-data: give one of them, or --no-verify")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
