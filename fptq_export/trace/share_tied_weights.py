"""Let modules whose weight is one tensor of the checkpoint read one initializer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from fptq_export.trace.weights import is_parameter

__all__ = ["share_tied_weights"]


def share_tied_weights(model: ir.Model, stored: Collection[str], tied: Mapping[str, str]) -> bool:
    """Merge initializers that the model ties, in place: a head and an embedding are then stored once.

    Rules:
        1. Parameters that are tied to one another, and that the checkpoint does not hold under names of their own,
           become the first of them.
        2. A parameter that the checkpoint holds under its own name is left alone, even where the config ties it: the
           head of T5 1.1 is no embedding, and transformers does not tie what the file tells apart.
        3. Parameters of other types or shapes, and what is no parameter, are left alone.

    Before: Gather(embedding), Transpose(head) -> MatMul. After: Gather(embedding), Transpose(embedding) -> MatMul.

    Args:
        model: Traced graph, with the exporter's metadata.
        stored: Names of the checkpoint's tensors.
        tied: Parameter path -> path of the parameter that it shares storage with.

    Returns:
        Whether anything changed.
    """
    first: dict[str, ir.Value] = {}
    modified = False
    for name, value in list(model.graph.initializers.items()):
        if name in stored or name not in tied or not is_parameter(value):
            continue
        same = first.setdefault(tied[name], value)
        if same is value or (same.dtype, same.shape) != (value.dtype, value.shape):
            continue
        ir.convenience.replace_all_uses_with(value, same)
        del model.graph.initializers[name]
        modified = True
    return modified
