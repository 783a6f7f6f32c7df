"""Option names people paste from other tools, and the one spelling of ours.

Dashes, underscores and capitals are interchangeable: `--calib_size`, `--calib-size` and `--calibSize` are one option.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from fptq_export.errors import UserError

__all__ = ["ALIASES", "canonical_arguments"]

ALIASES: dict[str, tuple[str, ...]] = {
    "--model": ("--model-dir", "--model-name-or-path", "--pyt-ckpt-path"),
    "--output": ("--output-dir", "--output-path", "--export-path"),
    "--engine": ("--save-engine",),
    "--dtype": ("--high-precision-dtype",),
    "--group-size": ("--block-size", "--awq-block-size"),
    "--calib-dataset": ("--dataset", "--calibration-data-path"),
    "--calib-data": ("--calibration-data", "--load-inputs"),
    "--calib-size": ("--num-samples", "--nsamples", "--num-calib-data"),
    "--calib-seq": ("--seqlen", "--seq-len", "--calib-max-seq-length"),
    "--text": ("--dataset", "--eval-dataset"),
    "--task-path": ("--include-path",),
    "--policy": ("--recipe", "--layer-config", "--layer-quant-scheme"),
    "--exclude": ("--nodes-to-exclude", "--exclude-layers", "--ignore-layers", "--ignore"),
    "--min-shapes": ("--trt-min-shapes",),
    "--opt-shapes": ("--trt-opt-shapes",),
    "--max-shapes": ("--trt-max-shapes",),
    "--max-kv-len": ("--max-kv-cache-capacity", "--max-seq-len"),
    "--compute-capability": ("--compute-capabilities",),
}
"""Our option -> what Model Optimizer, Edge-LLM, TensorRT-LLM, trtexec, Polygraphy and AutoRound call it."""

_VALUE_ALIASES = {
    "--dtype": {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}
}


def canonical_arguments(arguments: Sequence[str], known: Iterable[str]) -> list[str]:
    """Replace every option by our spelling of it.

    Args:
        arguments: The command line, without the program's name.
        known: Every option of the parser, in our spelling.

    Raises:
        UserError: An option is unknown; the nearest one is named.
    """
    options = list(known)
    spelling = {_squashed(option): option for option in options}
    for option, aliases in ALIASES.items():
        if option in options:
            spelling |= {_squashed(alias): option for alias in aliases}
    result: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[position:]]
        result.append(_canonical(argument, spelling, options))
    return _with_value_aliases(result)


def _canonical(argument: str, spelling: dict[str, str], options: list[str]) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    if _squashed(name) in spelling:
        return f"{spelling[_squashed(name)]}{equals}{value}"
    near = difflib.get_close_matches(name, options, n=1)
    raise UserError(name, "is not an option", f"did you mean {near[0]}?" if near else "see --help for all options")


def _squashed(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _with_value_aliases(arguments: list[str]) -> list[str]:
    result: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in _VALUE_ALIASES:
            argument = f"{name}={_VALUE_ALIASES[name].get(value.lower(), value)}"
        elif result and result[-1] in _VALUE_ALIASES:
            argument = _VALUE_ALIASES[result[-1]].get(argument.lower(), argument)
        result.append(argument)
    return result
