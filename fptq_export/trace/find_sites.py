"""`sites.json` of a traced graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from fptq_export.errors import UserError
from fptq_export.sites import FoldSite, Linear, Sites, UnmatchedLinear
from fptq_export.trace.find_extension_sites import extension_site
from fptq_export.trace.find_fold_sites import fold_site_or_reason
from fptq_export.trace.find_linears import LinearNode, find_linears, name_linear_nodes
from fptq_export.trace.model_linears import LinearRole

__all__ = ["sites_from_graph", "sites_from_linears"]


_NO_ROLE = LinearRole()


def sites_from_graph(
    model: ir.Model, modules: Mapping[str, tuple[int, int]], roles: Mapping[str, LinearRole] | None = None
) -> Sites:
    """Find every linear of a traced graph, what it shares its input with, and where that can be equalized.

    Args:
        model: Traced and cleaned graph, with the exporter's metadata. The nodes of each linear are renamed after its
            torch path.
        modules: Torch path -> (in_features, out_features) of every linear of the model.
        roles: What is special about some of them.

    Raises:
        UserError: The graph has no linear at all.
    """
    roles = roles or {}
    linears, unmatched = find_linears(model, modules)
    if not linears:
        raise UserError("model", "has no linear layer that could be quantized", "export a transformer")
    sites = sites_from_linears(model, linears, roles)
    unmatched_linears = tuple(
        UnmatchedLinear(path=path, in_features=modules[path][0], out_features=modules[path][1], reason=reason)
        for path, reason in unmatched.items()
        if roles.get(path, _NO_ROLE).is_linear
    )
    return sites.model_copy(update={"unmatched": unmatched_linears})


def sites_from_linears(model: ir.Model, linears: Mapping[str, LinearNode], roles: Mapping[str, LinearRole]) -> Sites:
    """What each linear shares its input with, and where that can be equalized.

    Args:
        model: The graph.
        linears: Every linear of it, by path. Their nodes are renamed after the paths.
        roles: What is special about some of them.
    """
    name_linear_nodes(model, linears)
    readers: dict[int, list[LinearNode]] = {}
    for linear in linears.values():
        readers.setdefault(id(linear.input), []).append(linear)
    outcome = {key: fold_site_or_reason(group[0].input, group, linears) for key, group in readers.items()}
    extensions = [
        extension_site(group[0].input, group, linears)
        for key, group in readers.items()
        if not isinstance(outcome[key], FoldSite)
    ]
    return Sites(
        linears=tuple(
            _linear_entry(linear, outcome[id(linear.input)], roles.get(path, _NO_ROLE))
            for path, linear in linears.items()
        ),
        fold_sites=tuple(found for found in (*outcome.values(), *extensions) if isinstance(found, FoldSite)),
    )


def _linear_entry(linear: LinearNode, outcome: FoldSite | str, role: LinearRole) -> Linear:
    if linear.matmul.name is None or linear.weight.name is None or linear.input.name is None:
        raise RuntimeError(f"a node or value of {linear.path} has no name")
    return Linear(
        path=linear.path,
        node=linear.matmul.name,
        weight=linear.weight.name,
        weight_transposed=linear.transpose is not None,
        bias=linear.bias.name if linear.bias is not None else None,
        in_features=linear.in_features,
        out_features=linear.out_features,
        input=linear.input.name,
        site=outcome.id if isinstance(outcome, FoldSite) else None,
        no_site_reason=None if isinstance(outcome, FoldSite) else outcome,
        expert=role.expert,
        float_reason=role.float_reason,
    )
