"""Everything that can be wrong with an edited policy, each with its JSON path."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from calib.equalize import closed_form_scale
from calib.given import GivenLayer
from fptq_export.errors import Problem
from fptq_export.files import json_path_from_location
from fptq_export.policy import GROUP_SIZES, LayerPolicy, Policy, Precision
from fptq_export.sites import FoldSite, Linear, Sites

__all__ = ["policy_problems"]

_SMALLEST_SCALE, _LARGEST_SCALE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_NEEDED: Mapping[Precision, tuple[str, ...]] = {
    "w4a8": ("activation", "group_size", "weight_method"),
    "w4a16": ("group_size", "weight_method"),
    "w8a8": ("activation", "weight_method"),
    "float": (),
}
_MUST_BE_NULL: Mapping[Precision, tuple[str, ...]] = {
    "w4a8": (),
    "w4a16": ("activation", "activation_scale"),
    "w8a8": ("group_size", "sequential"),
    "float": ("activation", "activation_scale", "group_size", "weight_method", "sequential"),
}


def policy_problems(
    policy: Policy,
    sites: Sites,
    maxima: Mapping[str, NDArray[np.float32]],
    given: Mapping[str, GivenLayer] | None = None,
) -> Iterator[Problem]:
    """List what stands between a policy and a model that runs it.

    Args:
        policy: As read from the file.
        sites: Linears and fold sites of the traced graph.
        maxima: Linear path -> stored channel maxima, float32 [in].
        given: Linear path -> the INT4 codes that came with the model; None where none did.

    Yields:
        One problem for each wrong entry; nothing if the policy can be replayed.
    """
    linears = {linear.path: linear for linear in sites.linears}
    unmatched = {linear.path: linear for linear in sites.unmatched}
    read = sites.site_by_consumer()
    for path in (*linears, *unmatched):
        if path not in policy.layers:
            yield _problem(path, "", "missing; every linear of the model has an entry")
    for path, layer in policy.layers.items():
        if path in unmatched:
            if layer.precision != "float":
                yield _problem(path, "precision", f"this layer cannot be quantized ({unmatched[path].reason})")
        elif path not in linears:
            yield _problem(path, "", "the traced model has no such linear")
        else:
            yield from _layer_problems(layer, linears[path], maxima, in_table=read.get(path) in policy.equalization)
            if layer.weight_method == "given":
                yield from _given_problems(layer, linears[path], (given or {}).get(path))
    unreached = {
        path for path, linear in linears.items() if linear.expert and path in maxima and not maxima[path].any()
    }
    for site in sites.fold_sites:
        yield from _shared_input_problems(site, policy, unreached)
    if not policy.quantized() and not policy.quantized_convolutions():
        yield Problem("$.layers", "every layer is float: there is nothing to quantize")


def _problem(path: str, field: str, message: str) -> Problem:
    return Problem(json_path_from_location(("layers", path, field) if field else ("layers", path)), message)


def _layer_problems(
    layer: LayerPolicy, linear: Linear, maxima: Mapping[str, NDArray[np.float32]], *, in_table: bool
) -> Iterator[Problem]:
    for field in ("in_features", "out_features", "site"):
        given, traced = getattr(layer, field), getattr(linear, field)
        if given != traced:
            yield _problem(linear.path, field, f"is {given}, but the traced model has {traced}")
    for field in _MUST_BE_NULL[layer.precision]:
        if getattr(layer, field) is not None:
            yield _problem(linear.path, field, f"a {layer.precision} layer has none: set it to null")
    if layer.precision == "float":
        return
    if linear.float_reason is not None:
        yield _problem(linear.path, "precision", f"this layer cannot be quantized ({linear.float_reason})")
        return
    if linear.path not in maxima:
        yield _problem(linear.path, "precision", "its input was not measured: calibrate again without excluding it")
        return
    for field in _NEEDED[layer.precision]:
        if getattr(layer, field) is None:
            yield _problem(linear.path, field, f"a {layer.precision} layer needs one")
    if layer.precision == "w8a8" and layer.weight_method not in (None, "rtn"):
        yield _problem(linear.path, "weight_method", "a w8a8 layer is rounded to nearest: use rtn")
    if layer.precision != "w4a8" and layer.signed_scales:
        yield _problem(linear.path, "signed_scales", "only the plugin runs them, and it runs w4a8 layers only")
    yield from _group_size_problems(layer, linear)
    yield from _sequential_problems(layer, linear)
    yield from _activation_problems(layer, linear, float(maxima[linear.path].max()), in_table=in_table)


def _given_problems(layer: LayerPolicy, linear: Linear, given: GivenLayer | None) -> Iterator[Problem]:
    """Codes that are taken as they are fit one group size and the weight as it is."""
    if given is None:
        yield _problem(linear.path, "weight_method", "the model holds no INT4 codes for it; choose another")
        return
    if layer.group_size != given.group_size:
        cause = f"is {layer.group_size}, but the given codes have {given.group_size}; or choose another weight_method"
        yield _problem(linear.path, "group_size", cause)
    if layer.signed_scales != given.signed_scales:
        yield _problem(linear.path, "signed_scales", f"the given scales make it {str(given.signed_scales).lower()}")
    if layer.activation == "lae_static":
        yield _problem(linear.path, "activation", "equalization would change the given codes: use static or per_token")


def _group_size_problems(layer: LayerPolicy, linear: Linear) -> Iterator[Problem]:
    size = layer.group_size
    if size is None:
        return
    if size not in GROUP_SIZES:
        yield _problem(linear.path, "group_size", f"{size} is not supported; choose one of {_listed(GROUP_SIZES)}")
    elif linear.in_features % size:
        cause = f"group_size must divide in_features ({size} does not divide {linear.in_features})"
        yield _problem(linear.path, "group_size", cause)


def _sequential_problems(layer: LayerPolicy, linear: Linear) -> Iterator[Problem]:
    """Codes that are kept fit what the entry says."""
    if layer.sequential is None or layer.precision not in ("w4a8", "w4a16"):
        return
    for field in ("weight_method", "group_size", "signed_scales"):
        now, made = getattr(layer, field), getattr(layer.sequential, field)
        if now != made:
            cause = f"is {now}, but the stored codes were made with {made}; to quantize it anew, remove its sequential"
            yield _problem(linear.path, field, cause)


def _activation_problems(layer: LayerPolicy, linear: Linear, measured: float, *, in_table: bool) -> Iterator[Problem]:
    if layer.activation == "lae_static" and linear.site is None:
        yield _problem(
            linear.path,
            "activation",
            f"lae_static needs an exact fold site, and there is none ({linear.no_site_reason})",
        )
    if linear.expert is not None and measured == 0.0 and layer.activation not in (None, "per_token"):
        cause = f"is {layer.activation}, but calibration routed no token to this expert: use per_token"
        yield _problem(linear.path, "activation", cause)
    if layer.input_absmax is not None and layer.input_absmax != measured:
        yield _problem(
            linear.path, "input_absmax", f"is {layer.input_absmax}, but {measured} was measured; it is not for editing"
        )
    if layer.activation_scale is not None and layer.activation is not None:
        yield from _scale_problems(layer, linear, layer.activation_scale, measured, in_table=in_table)


def _scale_problems(
    layer: LayerPolicy, linear: Linear, scale: float, measured: float, *, in_table: bool
) -> Iterator[Problem]:
    if layer.activation == "per_token":
        yield _problem(linear.path, "activation_scale", "per_token computes its scales at run time: set it to null")
        return
    if not _SMALLEST_SCALE <= scale <= _LARGEST_SCALE:
        yield _problem(linear.path, "activation_scale", f"{scale} is not a normal float32")
        return
    if in_table:
        return  # `outdated_scale_problems` compares, once the table is known to be sound.
    equalized = layer.activation == "lae_static"
    own, other = (closed_form_scale(measured, equalized=tier) for tier in (equalized, not equalized))
    if scale == other != own:
        tier = "static" if equalized else "lae_static"
        yield _problem(
            linear.path, "activation_scale", f"is the scale of {tier}, left over from before the edit: set it to null"
        )


def _shared_input_problems(site: FoldSite, policy: Policy, unreached: Collection[str]) -> Iterator[Problem]:
    """A fold changes the tensor that all consumers read, so they are equalized together or not at all.

    Linears of experts that no token reached are quantized token by token, whatever the others do.

    A site in the table is equalized whatever the tiers say; `table_problems` looks at it.

    It changes the rows of a producing linear too, so that one must not have given codes.
    """
    quantized = policy.quantized()
    tiers = {path: tier for path in site.consumers if path in quantized and (tier := quantized[path].activation)}
    equalized = [path for path, activation in tiers.items() if activation == "lae_static"]
    if not equalized or site.id in policy.equalization:
        return
    producer = quantized.get(site.producer_linear or "")
    if site.producer_linear is not None and producer is not None and producer.weight_method == "given":
        cause = f"{_listed(equalized)} is lae_static, which would change the given codes of this layer"
        yield _problem(site.producer_linear, "weight_method", cause)
    for path, activation in tiers.items():
        if activation != "lae_static" and path not in unreached:
            yield _problem(
                path,
                "activation",
                f"is {activation}, but {_listed(equalized)} reads the same tensor as lae_static: use one tier for all",
            )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
