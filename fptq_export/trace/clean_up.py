"""Shrink what torch's exporter writes: fold shape arithmetic, drop what does nothing, name what people look for.

Only library passes run here. Weights are never folded: the size limit keeps every per-channel tensor of a real model,
and `Transpose` of a weight is a layout decision that `weights.transpose_linear_weights` takes.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import optimize_ir

__all__ = ["clean_up", "strip_trace_metadata"]

_FOLD_INPUT_ELEMENTS = 256
_FOLD_OUTPUT_ELEMENTS = 1024
_ROUNDS = 2
"""The second round folds what the first one's deduplication brought together; a third changes nothing on LLaMA."""


def clean_up(model: ir.Model) -> None:
    """Fold constants, merge equal nodes and remove unused ones, in place.

    Equal nodes are merged first: it is cheap and leaves the folder a third of the nodes.
    """
    merge_equal_nodes = common.CommonSubexpressionEliminationPass()
    for _ in range(_ROUNDS):
        merge_equal_nodes(model)
        optimize_ir(
            model,
            num_iterations=1,
            onnx_shape_inference=False,
            input_size_limit=_FOLD_INPUT_ELEMENTS,
            output_size_limit=_FOLD_OUTPUT_ELEMENTS,
        )
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def strip_trace_metadata(model: ir.Model) -> None:
    """Remove the exporter's notes (stack traces, module scopes) once the sites have been read from them."""
    common.ClearMetadataAndDocStringPass()(model)
