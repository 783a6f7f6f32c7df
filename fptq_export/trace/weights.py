"""Point the initializers of a traced graph at the checkpoint, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import lazy_tensor
from fptq_export.stored_tensor import StoredTensor

__all__ = ["attach_weights", "is_parameter", "transpose_linear_weights"]

_KIND_KEY = "pkg.torch.export.graph_signature.InputSpec.kind"
"""torch's exporter notes here whether an initializer is a parameter, a buffer or a constant of the code."""


def attach_weights(
    model: ir.Model,
    files: Mapping[str, StoredTensor],
    buffers: Mapping[str, NDArray[np.generic]],
    tied: Mapping[str, str],
) -> None:
    """Give every initializer without a value a lazy one.

    Args:
        model: Traced graph; changed in place.
        files: Tensor name -> where it is stored.
        buffers: Values that no file holds.
        tied: Parameter path -> path of the parameter it shares storage with.

    Raises:
        UserError: An initializer is in neither place.
    """
    aliases = {**tied, **{target: name for name, target in tied.items() if name in files}}
    for name, value in model.graph.initializers.items():
        if value.const_value is None or value.dtype is None or value.shape is None:
            raise RuntimeError(f"initializer {name!r} has no type or shape")
        if value.metadata_props.get(_KIND_KEY) not in ("PARAMETER", "BUFFER"):
            continue
        stored = name if name in files or name in buffers else aliases.get(name, name)
        shape = value.shape.numpy()
        if stored in files:
            value.const_value = _tensor_from_file(name, files[stored], value.dtype, shape)
        elif stored in buffers:
            value.const_value = ir.Tensor(buffers[stored].astype(value.dtype.numpy()), dtype=value.dtype, name=name)
        else:
            raise UserError(
                f"tensor {name!r}",
                "the traced graph reads it but no checkpoint file holds it",
                "check that the checkpoint is complete and belongs to this config",
            )


def is_parameter(value: ir.Value) -> bool:
    """Whether an initializer is a parameter of the torch model. Needs the exporter's metadata."""
    return value.metadata_props.get(_KIND_KEY) == "PARAMETER"


def _tensor_from_file(name: str, stored: StoredTensor, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.LazyTensor:
    return lazy_tensor(name, dtype, shape, lambda: stored.read_as(dtype.numpy()))


def transpose_linear_weights(model: ir.Model) -> bool:
    """Store the weight of a linear as its MatMul reads it.

    Rules:
        1. `Transpose(initializer, perm=(1, 0))` whose initializer nothing else reads becomes an initializer of the
           transposed shape.
        2. An initializer that something else reads (an embedding tied to lm_head) is left alone: a transposed copy
           would double it on disk.

    Before: x, Transpose(W [out, in]) -> MatMul. After: x, W [in, out] -> MatMul.

    Returns:
        Whether anything changed.
    """
    modified = False
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.attributes.get_ints("perm", ()) != (1, 0):
            continue
        source = node.inputs[0]
        if source is None or source.name not in model.graph.initializers or len(source.uses()) != 1:
            continue
        _transpose_initializer(source)
        ir.convenience.replace_all_uses_with(node.outputs[0], source)
        model.graph.remove(node, safe=True)
        modified = True
    return modified


def _transpose_initializer(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or value.name is None or value.shape is None:
        raise RuntimeError(f"initializer {value.name!r} has no value")
    rows, columns = value.shape.numpy()
    value.const_value = lazy_tensor(
        value.name, tensor.dtype, (columns, rows), lambda: np.ascontiguousarray(tensor.numpy().T)
    )
    value.shape = ir.Shape((columns, rows))
