"""What convolutions run, and their codes: INT8 weights by output channel, INT8 inputs with one scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.equalize import closed_form_scale
from calib.precision import Choice
from calib.stats import Stats
from calib.weights.per_channel import quantize_int8
from fptq_export.errors import Problem, UserError
from fptq_export.files import json_path_from_location
from fptq_export.policy import ConvolutionPolicy, Policy
from fptq_export.sites import Convolution, Sites
from fptq_export.tensor_writer import TensorSpec

__all__ = [
    "completed_convolutions",
    "convolution_arrays",
    "convolution_problems",
    "convolution_specs",
    "decide_convolutions",
]

Maxima = Mapping[str, NDArray[np.float32]]


def decide_convolutions(sites: Sites, stats: Stats, choices: Mapping[str, Choice]) -> dict[str, ConvolutionPolicy]:
    """Quantize every convolution that may be, unless a pattern keeps it float.

    Args:
        sites: Convolutions of the graph.
        stats: Covers those that may be quantized.
        choices: Path -> what a pattern says.

    Raises:
        UserError: A pattern asks for INT4 weights, which no convolution has.
    """
    entries = {}
    for found in sites.convolutions:
        choice = choices.get(found.path)
        if choice is not None and choice.precision not in ("w8a8", "float"):
            cause = f"{found.path} is a convolution, and those run w8a8 or float"
            raise UserError(f"--precision {choice.pattern!r}", cause, "write a pattern that matches linears only")
        reason = found.float_reason
        if reason is None and choice is not None and choice.precision == "float":
            reason = choice.float_reason
        if reason is not None:
            entries[found.path] = _entry(found, "float", reason)
            continue
        absmax = stats.absmax(found.path)
        reason = f"max|x| {absmax:.6g}: INT8 weights by output channel, one INT8 scale for the input"
        entries[found.path] = _entry(found, "w8a8", reason).model_copy(
            update={"input_absmax": absmax, "activation_scale": closed_form_scale(absmax, equalized=False)}
        )
    return entries


def convolution_specs(policy: Policy, sites: Sites) -> dict[str, TensorSpec]:
    """Types and shapes of the codes and scales of all quantized convolutions."""
    axes = {found.path: found.channel_axis for found in sites.convolutions}
    specs = {}
    for path, entry in policy.quantized_convolutions().items():
        specs[f"{path}.weight_codes"] = TensorSpec.of("int8", *entry.weight_shape)
        specs[f"{path}.weight_scales"] = TensorSpec.of("float32", entry.weight_shape[axes[path]])
    return specs


def convolution_arrays(
    policy: Policy, sites: Sites, read: Callable[[str], NDArray[np.float32]]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Codes and scales of every quantized convolution, one weight in memory at a time.

    Args:
        policy: Says which are quantized.
        sites: Convolutions of the graph.
        read: Gives the weight, float32, by the name of its initializer.

    Raises:
        UserError: A weight is not finite.
    """
    quantized = policy.quantized_convolutions()
    for found in sites.convolutions:
        if found.path not in quantized:
            continue
        weight = read(found.weight)
        if not np.isfinite(weight).all():
            hint = f"leave it in float: --precision '{found.path}=float'"
            raise UserError(f"convolution {found.path}", "its weight is not finite in float32", hint)
        channels_first = np.moveaxis(weight, found.channel_axis, 0)
        rows = torch.from_numpy(np.ascontiguousarray(channels_first.reshape(channels_first.shape[0], -1)))
        codes, scales = quantize_int8(rows)
        codes_of_shape = np.moveaxis(codes.numpy().reshape(channels_first.shape), 0, found.channel_axis)
        yield f"{found.path}.weight_codes", np.ascontiguousarray(codes_of_shape)
        yield f"{found.path}.weight_scales", scales.numpy()


def convolution_problems(policy: Policy, sites: Sites, maxima: Maxima) -> Iterator[Problem]:
    """List entries of an edited policy that cannot be carried out, each with its JSON path."""
    known = {found.path: found for found in sites.convolutions}
    for path in known:
        if path not in policy.convolutions:
            yield _problem(path, "", "missing; every convolution of the model has an entry")
    for path, entry in policy.convolutions.items():
        found = known.get(path)
        if found is None:
            yield _problem(path, "", "the graph has no such convolution")
            continue
        if entry.weight_shape != found.weight_shape:
            cause = f"is {list(entry.weight_shape)}, but the graph has {list(found.weight_shape)}"
            yield _problem(path, "weight_shape", cause)
        if entry.precision == "float":
            if entry.activation_scale is not None:
                yield _problem(path, "activation_scale", "a float convolution has none: set it to null")
        elif found.float_reason is not None:
            yield _problem(path, "precision", f"this convolution cannot be quantized ({found.float_reason})")
        elif path not in maxima:
            yield _problem(path, "precision", "its input was not measured: calibrate again")


def completed_convolutions(policy: Policy, maxima: Maxima) -> dict[str, ConvolutionPolicy]:
    """The entries of an edited policy with the scales that were left open."""
    completed = {}
    for path, entry in policy.convolutions.items():
        update: dict[str, Any] = {}
        if entry.precision != "float":
            update["input_absmax"] = measured = float(maxima[path].max())
            if entry.activation_scale is None:
                update["activation_scale"] = closed_form_scale(measured, equalized=False)
        completed[path] = entry.model_copy(update=update)
    return completed


def _entry(found: Convolution, precision: str, reason: str) -> ConvolutionPolicy:
    return ConvolutionPolicy.model_validate(
        {"precision": precision, "reason": reason, "weight_shape": found.weight_shape}
    )


def _problem(path: str, field: str, message: str) -> Problem:
    location = ("convolutions", path, field) if field else ("convolutions", path)
    return Problem(json_path_from_location(location), message)
