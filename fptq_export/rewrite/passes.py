"""The ordered list of rewrites, and why this order.

1. What the caller of the graph sees, where it is asked for (`graph_form`): `LastTokenLogits`, `StaticCache` and the
   fusions that go with it. First, so that all that follows is checked against the inputs and outputs that remain; after
   the sites were found, which look for the arithmetic that is fused here. `EmitRangeOutputs` closes this group: it adds
   an output, the tensors that linears read are final once the fusions and the slice before the head are done, and no
   quantizer stands between yet. The fold that follows changes numbers and no tensor, so equalized inputs are monitored.
2. `FoldEqualization`: it changes float weights, which exist only before quantization.
3. `InsertQdq` for linears, `QuantizeConvolutions` for convolutions: the standard form, `model.qdq.onnx`.
4. `FuseW4A8Linears`: matches that standard form, so a graph quantized elsewhere can be fused too: `model.w4a8.onnx`.
5. Per target, at build time, on a copy that is never written beside the others: `FixCacheLength`. Where the plugin is
   used: `FuseProjections` while the weights are still in ONNX order, then `LowerToPlugin`, which packs them. Then
   `LowerToNative` for every linear that is still portable, `LowerTransposedConvolutions`, then `LintPrecision`.

`CheckInvariants` runs after 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from fptq_export.files import atomic_path, write_json_model
from fptq_export.graph_io import data_path, load_graph, save_graph, write_weights
from fptq_export.policy import Policy, PolicyArrays
from fptq_export.progress import Progress
from fptq_export.rewrite.check_invariants import CheckInvariants, interface_from_graph
from fptq_export.rewrite.emit_range_outputs import EmitRangeOutputs
from fptq_export.rewrite.fix_cache_length import FixCacheLength
from fptq_export.rewrite.fold_equalization import FoldEqualization
from fptq_export.rewrite.fuse_projections import FuseProjections
from fptq_export.rewrite.fuse_w4a8_linears import FuseW4A8Linears
from fptq_export.rewrite.graph_form import GraphForm, bring_into_form
from fptq_export.rewrite.insert_qdq import InsertQdq
from fptq_export.rewrite.lint_precision import LintPrecision
from fptq_export.rewrite.lower_to_native import LowerToNative
from fptq_export.rewrite.lower_to_plugin import LowerToPlugin
from fptq_export.rewrite.lower_transposed_convolutions import LowerTransposedConvolutions
from fptq_export.rewrite.quantize_convolutions import QuantizeConvolutions
from fptq_export.sites import Sites

__all__ = ["GraphForm", "Lowered", "RewritePaths", "lower_for_plugin", "lower_for_tensorrt", "rewrite"]


@dataclass(frozen=True)
class RewritePaths:
    """Files of the rewrite stage; both graphs read the data file beside `w4a8`."""

    model: Path
    qdq: Path
    w4a8: Path
    ranges: Path | None = None
    """Where the rows of the output `range_monitor` are described; the graphs have that output where it is given."""


@dataclass(frozen=True)
class Lowered:
    """Who runs the quantized linears of a lowered graph; those of neither mapping run natively by choice."""

    plugin: Mapping[str, str] = field(default_factory=dict)
    """Path -> operator of the plugin; the path is a torch path or one of `fused`."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Path of a fused linear -> torch paths of the linears it computes."""
    left_alone: Mapping[str, str] = field(default_factory=dict)
    """Torch path -> why the plugin does not run it."""
    convolutions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Path of a ConvTranspose that became a Conv -> shape of its weight now."""


def rewrite(
    paths: RewritePaths,
    sites: Sites,
    policy: Policy,
    arrays: PolicyArrays,
    progress: Progress,
    form: GraphForm | None = None,
) -> dict[str, Any]:
    """Write the Q/DQ form and the fused form of a graph.

    Args:
        paths: Where the traced graph is and where the two forms go.
        sites: Linears and fold sites of the traced graph.
        policy: What each linear runs.
        arrays: Codes, scales and equalizations.
        progress: Where to report.
        form: What the caller of the two forms sees; as traced where it is None.

    Returns:
        For the summary of the stage: what the form changed, see `bring_into_form`.

    Raises:
        UserError: A fold overflows the graph's type, the graph cannot be brought into the form, or its ranges are to be
            monitored and no layer is static.
        PrecisionError: A rewrite broke an invariant.
    """
    model = load_graph(paths.model)
    brought = bring_into_form(model, form if form is not None else GraphForm())
    if paths.ranges is not None:
        _emit_range_outputs(model, EmitRangeOutputs(sites, policy, arrays), paths.ranges)
    check = CheckInvariants(interface_from_graph(model), sites, policy)
    equalization = {
        site: arrays.read(f"{site}.equalization", (sites.site(site).channels,)) for site in policy.equalized_sites()
    }
    FoldEqualization(sites, equalization)(model)
    InsertQdq(sites, policy, arrays)(model)
    QuantizeConvolutions(sites, policy, arrays)(model)
    check(model)
    with progress.task("Writing the quantized weights", total=None, unit="tensors") as task:
        write_weights(model, data_path(paths.w4a8), lambda done, total: task.update(done, total))
    save_graph(model, paths.qdq)
    FuseW4A8Linears()(model)
    check(model)
    save_graph(model, paths.w4a8)
    for path in (paths.qdq, paths.w4a8):
        onnx.checker.check_model(str(path))
    return brought


def _emit_range_outputs(model: ir.Model, emit: EmitRangeOutputs, path: Path) -> None:
    emit(model)
    if emit.ranges is None:
        raise RuntimeError("the pass described no row")
    write_json_model(emit.ranges, path)


def lower_for_tensorrt(w4a8: Path, lowered: Path, cache_length: int | None = None) -> Lowered:
    """Write the graph a TensorRT without our plugin can build; its weights stay in the data file of `w4a8`.

    Args:
        w4a8: `model.w4a8.onnx`.
        lowered: Where the lowered graph goes. External data locations stay relative to the directory of `w4a8`; weights
            of transposed convolutions, which are rearranged, lie in the graph.
        cache_length: Slots of a static KV cache; None leaves them open, which TensorRT refuses.

    Raises:
        PrecisionError: The graph would run another precision than it says.
    """
    model = load_graph(w4a8)
    if cache_length is not None:
        FixCacheLength(cache_length)(model)
    LowerToNative()(model)
    transposed = LowerTransposedConvolutions()
    transposed(model)
    LintPrecision()(model)
    with atomic_path(lowered) as partial:
        onnx.save(ir.to_proto(model), str(partial), format="protobuf")
    return Lowered(convolutions=transposed.lowered)


def lower_for_plugin(
    w4a8: Path, lowered: Path, cache_length: int | None = None, *, fuse_projections: bool = True
) -> Lowered:
    """Write the graph a TensorRT with our plugin builds, and its weights in tile order beside it.

    Linears that the kernels cannot run are lowered as in `lower_for_tensorrt`; the result says which and why.

    Args:
        w4a8: `model.w4a8.onnx`.
        lowered: Where the lowered graph goes; all its weights go to the data file beside it.
        cache_length: As for `lower_for_tensorrt`.
        fuse_projections: Multiply once where several linears read one tensor.

    Raises:
        PrecisionError: The graph would run another precision than it says.
    """
    model = load_graph(w4a8)
    if cache_length is not None:
        FixCacheLength(cache_length)(model)
    fuse, to_plugin, transposed = FuseProjections(), LowerToPlugin(), LowerTransposedConvolutions()
    if fuse_projections:
        fuse(model)
    to_plugin(model)
    LowerToNative()(model)
    transposed(model)
    LintPrecision()(model)
    write_weights(model, data_path(lowered))
    save_graph(model, lowered)
    return Lowered(to_plugin.lowered, fuse.fused, to_plugin.left_alone, transposed.lowered)
