"""Policies for any traced model, made from `fptq_export.numerics` alone: independent of the code in `calib`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export import numerics
from fptq_export.graph_io import load_graph
from fptq_export.packing import packed_from_int4
from fptq_export.policy import (
    Activation,
    LayerPolicy,
    Policy,
    PolicyArrays,
    Precision,
    Rule,
    arrays_path,
    write_policy,
)
from fptq_export.sites import Linear, Sites
from tests.support.traced import Traced, run, token_feed

__all__ = ["float_weight", "measured_absmax", "mixed_precisions", "mixed_tiers", "rtn_policy"]

_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "w8a8": {"precision": "w8a8", "group_size": None},
    "w4a16": {"precision": "w4a16", "activation": None, "activation_scale": None},
}
"""What another precision changes in a `w4a8` entry."""
TIERS: tuple[Activation, ...] = ("static", "lae_static", "per_token")


def measured_absmax(traced: Traced, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Largest magnitude of each input channel of each linear, by path, measured by running the graph."""
    inputs = {linear.path: linear.input for linear in traced.sites.linears}
    probe = traced.model.with_name("probe.onnx")
    proto = onnx.load(traced.model, load_external_data=False)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(inputs.values()))
    onnx.save(proto, probe)
    values = run(probe, token_feed(traced.model, ids), outputs=tuple(dict.fromkeys(inputs.values())))
    return {
        path: np.abs(values[name].astype(np.float32)).reshape(-1, values[name].shape[-1]).max(axis=0)
        for path, name in inputs.items()
    }


def mixed_tiers(sites: Sites, exclude: tuple[str, ...] = ("lm_head",)) -> dict[str, Activation]:
    """A tier for every linear, all three in turn; linears that read one tensor share it."""
    readers: dict[str, list[Linear]] = {}
    for linear in sites.linears:
        if linear.path not in exclude:
            readers.setdefault(linear.input, []).append(linear)
    tiers: dict[str, Activation] = {}
    for index, group in enumerate(readers.values()):
        tier = TIERS[index % len(TIERS)]
        if tier == "lae_static" and group[0].site is None:
            tier = "per_token"
        tiers.update({linear.path: tier for linear in group})
    return tiers


def mixed_precisions(sites: Sites) -> dict[str, Precision]:
    """All three in turn, so that q, k and v differ; the head, which writes an output of the graph, is `w8a8`."""
    names: tuple[Precision, ...] = ("w8a8", "w4a8", "w4a16")
    chosen = {linear.path: names[index % len(names)] for index, linear in enumerate(sites.linears)}
    return chosen | {"lm_head": "w8a8"}


def float_weight(model: ir.Model, linear: Linear) -> NDArray[np.float32]:
    """The weight of a linear as torch has it, float32 [out, in]."""
    tensor = model.graph.initializers[linear.weight].const_value
    assert tensor is not None
    array = tensor.numpy().astype(np.float32)
    return array if linear.weight_transposed else array.T


def rtn_policy(
    traced: Traced,
    path: Path,
    tiers: Mapping[str, Activation],
    absmax: Mapping[str, NDArray[np.float32]],
    *,
    group_size: int = 32,
    precisions: Mapping[str, Precision] | None = None,
) -> tuple[Policy, PolicyArrays]:
    """Write a policy with round-to-nearest weights for the linears in `tiers`; the others stay float.

    Args:
        traced: The model.
        path: Where `policy.json` goes.
        tiers: Torch path -> tier.
        absmax: Torch path -> largest magnitude of each input channel, float32 [in].
        group_size: Wanted group size.
        precisions: Torch path -> precision of linears in `tiers` that are not `w4a8`.
    """
    sites = traced.sites
    site_of = sites.site_by_consumer()
    equalized = {site_of[name] for name, tier in tiers.items() if tier == "lae_static"}
    scales = {
        site.id: site.tied(numerics.equalization_from_absmax(absmax[site.consumers[0]]).astype(np.float32))
        for site in sites.fold_sites
        if site.id in equalized
    }
    model = load_graph(traced.model)
    arrays: dict[str, NDArray[Any]] = {f"{site}.equalization": scale for site, scale in scales.items()}
    layers = {}
    for linear in sites.linears:
        layer = _layer(linear, tiers.get(linear.path), absmax[linear.path], group_size)
        if layer.activation == "lae_static":  # also at a site that the rule does not use
            layer = layer.model_copy(update={"site": site_of[linear.path]})
        precision = (precisions or {}).get(linear.path, layer.precision)
        layers[linear.path] = layer.model_copy(update=_CHANGES.get(precision, {}))
        if linear.path not in tiers:
            continue
        weight = _equalized(float_weight(model, linear), linear, sites, scales)
        codes_name, scales_name = f"{linear.path}.weight_codes", f"{linear.path}.weight_scales"
        if precision == "w8a8":
            arrays[scales_name] = numerics.weight_scale_int8(weight)
            arrays[codes_name] = numerics.quantize_weight_int8(weight, arrays[scales_name]).astype(np.int8)
            continue
        step = arrays[scales_name] = numerics.weight_scale_rtn(weight, group_size)
        codes = numerics.quantize_weight_rtn(weight, step, group_size)
        arrays[codes_name] = packed_from_int4(codes.astype(np.int8))
    policy = Policy(model="test", rule=Rule(), layers=layers)
    write_policy(policy, arrays, path)
    return policy, PolicyArrays(arrays_path(path))


def _equalized(
    weight: NDArray[np.float32], linear: Linear, sites: Sites, scales: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float32]:
    for site in sites.fold_sites:
        if site.id in scales and linear.path in site.consumers:
            weight = weight * scales[site.id]
        if site.id in scales and site.producer_linear == linear.path:
            rows = slice(*(site.producers[0].span or (0, len(weight))))
            weight = weight.copy()
            weight[rows] /= site.producer_scale(scales[site.id])[:, None]
    return weight


def _layer(linear: Linear, tier: Activation | None, absmax: NDArray[np.float32], group_size: int) -> LayerPolicy:
    largest = float(absmax.max())
    after = numerics.equalized_absmax(largest) if tier == "lae_static" else largest
    static = tier in ("static", "lae_static")
    return LayerPolicy(
        precision="float" if tier is None else "w4a8",
        activation=tier,
        reason="test",
        in_features=linear.in_features,
        out_features=linear.out_features,
        input_absmax=largest,
        activation_scale=float(numerics.static_scale(after)) if static else None,
        group_size=None if tier is None else group_size,
        weight_method=None if tier is None else "rtn",
        site=linear.site,
    )
