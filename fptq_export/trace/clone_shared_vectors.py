"""Give every norm and bias its own constants: exporters merge equal ones, and a shared one cannot be equalized."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["clone_shared_vectors"]

_READERS = frozenset({"LayerNormalization", "RMSNormalization", "Mul", "Add"})
_LARGEST = 1 << 16
"""Elements; more is no vector of channels."""


def clone_shared_vectors(model: ir.Model) -> bool:
    """Let each reader of a shared constant vector read a copy, so that one can be changed and the others stay.

    Rules:
        1. A vector has one dimension above 1, the last. Its first reader keeps it; every other norm, Mul and Add of the
           main graph gets a clone. Values do not change.
        2. Matrices, scalars, and readers of other types or inside subgraphs are left alone.

    Before: w -> LayerNormalization, LayerNormalization. After: w -> LayerNormalization, w.1 -> LayerNormalization.

    Returns:
        Whether anything changed.
    """
    modified = False
    for value in list(model.graph.initializers.values()):
        if not _is_vector(value):
            continue
        for number, use in enumerate(list(value.uses())[1:], start=1):
            if use.node.op_type in _READERS and not use.node.domain and use.node.graph is model.graph:
                use.node.replace_input_with(use.idx, _clone(model, value, number))
                modified = True
    return modified


def _is_vector(value: ir.Value) -> bool:
    dims = value.shape.numpy() if value.shape is not None else ()
    return bool(dims) and 1 < dims[-1] <= _LARGEST and all(dim == 1 for dim in dims[:-1])


def _clone(model: ir.Model, value: ir.Value, number: int) -> ir.Value:
    tensor = value.const_value
    if tensor is None:
        raise RuntimeError(f"initializer {value.name!r} has no value")
    name = f"{value.name}.{number}"
    while name in model.graph.initializers:
        name += "_"
    copy = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
    clone = ir.Value(name=name, shape=ir.Shape(copy.shape), type=value.type, const_value=copy)
    model.graph.register_initializer(clone)
    return clone
