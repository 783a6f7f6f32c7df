"""Give a static KV cache its length, which TensorRT wants to know when it builds."""

from __future__ import annotations

import onnx_ir as ir

from fptq_export.rewrite.static_cache import CACHE_DIM, WRITE_INDICES

__all__ = ["FixCacheLength"]


class FixCacheLength(ir.passes.InPlacePass):
    """Replace the dimension `cache` by a number, everywhere in the graph.

    Rules:
        1. Every dimension of that name becomes the number; nodes are left alone.
        2. A graph without `write_indices` has a cache that grows: it is left alone.

    Args:
        length: Slots of the cache, at least 1.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename the dimension."""
        if all(value.name != WRITE_INDICES for value in model.graph.inputs):
            return ir.passes.PassResult(model, modified=False)
        outputs = (output for node in model.graph for output in node.outputs)
        for value in (*model.graph.inputs, *outputs):
            if value.shape is not None:
                value.shape = ir.Shape([self._length if _is_cache(dim) else dim for dim in value.shape])
        return ir.passes.PassResult(model, modified=True)


def _is_cache(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value == CACHE_DIM
