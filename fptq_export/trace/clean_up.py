"""Shrink what torch's exporter writes: fold shape arithmetic, drop what does nothing, name what people look for.

Library passes, and one of our own. Parameters are never folded: the rewrites look for them by name, and `Transpose` of
a weight is a layout decision that `weights.transpose_linear_weights` takes.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite

from fptq_export.policy import GROUP_SIZES
from fptq_export.trace.drop_idle_reshapes import drop_idle_reshapes
from fptq_export.trace.weights import is_parameter

__all__ = ["clean_up", "strip_trace_metadata"]

_FOLD_INPUT_ELEMENTS = 256
_FOLD_OUTPUT_ELEMENTS = 1024
_MERGE_ELEMENTS = min(GROUP_SIZES) - 1
"""Constants up to this size are merged when they are equal. A linear that can be quantized has more channels, so equal
norm weights or biases of two layers (all ones, all zeros) stay apart and each can be equalized."""


def clean_up(model: ir.Model) -> None:
    """Fold constants, merge equal nodes and remove unused ones, in place.

    The second round folds what the first one's merging brought together; a third changes nothing on LLaMA. The
    library's patterns are looked for once: they take most of the time, and have nothing left to find in the second.
    """
    common.InlinePass()(model)
    _merge_and_fold(model)
    rewrite(model)
    _share_constants(model)
    _merge_and_fold(model)
    common.RemoveUnusedNodesPass()(model)
    _share_constants(model)
    drop_idle_reshapes(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _merge_and_fold(model: ir.Model) -> None:
    """Equal nodes are merged first: it is cheap and leaves the folder a third of the nodes."""
    common.CommonSubexpressionEliminationPass()(model)
    fold_constants_ir(
        model,
        onnx_shape_inference=False,
        input_size_limit=_FOLD_INPUT_ELEMENTS,
        output_size_limit=_FOLD_OUTPUT_ELEMENTS,
        should_fold=_should_fold,
    )


def _share_constants(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=_MERGE_ELEMENTS)(model)


def _should_fold(node: ir.Node) -> bool | None:
    """False for what reads a parameter; None leaves the choice to the library's own rules."""
    return False if any(value is not None and is_parameter(value) for value in node.inputs) else None


def strip_trace_metadata(model: ir.Model) -> None:
    """Remove the exporter's notes (stack traces, module scopes) once the sites have been read from them."""
    common.ClearMetadataAndDocStringPass()(model)
    outputs = (output for node in model.graph for output in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        value.metadata_props.clear()
