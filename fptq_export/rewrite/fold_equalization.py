"""Fold x' = x / s into the producers of x and into the weights that read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import lazy_tensor
from fptq_export.sites import FoldSite, Linear, Producer, Sites

__all__ = ["FoldEqualization"]

Array = NDArray[np.generic]
Real = NDArray[np.float32]


class FoldEqualization(ir.passes.InPlacePass):
    """Divide the producers of each equalized site by s and multiply its consumers' input rows by s.

    Rules:
        1. A producer w becomes w / s along its channel axis; with a span (up in one matrix with gate) only there, and
           the rest keeps its bits; with an offset c (Gemma) it becomes (w + c) / s - c, stored in the type it is cast
           to before c is added: near -c FP16 keeps too few digits of (w + c) / s.
        2. The weight of every linear that reads the site, quantized or not, has its input rows multiplied by s.
        3. A weight that something else reads too (tied to an embedding) is cloned for the linear, never changed.
        4. Sites that are not equalized, and every other initializer, are left alone.

    Before: u -> Mul(w) -> MatMul(W). After: u -> Mul(w / s) -> MatMul(diag(s) W). Equal in exact arithmetic.

    Values are computed in float32 when the file is written, one tensor at a time.

    Args:
        sites: Fold sites of the graph.
        equalization: Site id -> s, float32 [channels], positive.
    """

    def __init__(self, sites: Sites, equalization: Mapping[str, Real]) -> None:
        super().__init__()
        self._sites = sites
        self._equalization = equalization

    def requires(self, model: ir.Model) -> None:
        """Every producer and consumer is in the graph, and s is positive and of the right length."""
        for site_id, scale in self._equalization.items():
            site = self._sites.site(site_id)
            if scale.shape != (site.channels,) or not (np.isfinite(scale).all() and (scale > 0).all()):
                raise ir.passes.PreconditionError(
                    f"equalization of {site_id!r} must be {site.channels} positive numbers"
                )
            if not np.array_equal(site.tied(scale), scale):
                raise ir.passes.PreconditionError(f"equalization of {site_id!r} differs where heads share values")
            rows = len(site.producer_scale(scale))
            for producer in site.producers:
                value = model.graph.initializers.get(producer.initializer)
                if value is None or value.shape is None:
                    raise ir.passes.PreconditionError(f"{site_id!r}: no initializer {producer.initializer!r}")
                size = value.shape.numpy()[producer.axis]
                start, stop = producer.span or (0, size)
                if stop > size or stop - start != rows:
                    cause = f"{rows} channels are not {start} to {stop} of {size}"
                    raise ir.passes.PreconditionError(f"{site_id!r}: {producer.initializer!r}: {cause}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every equalized site."""
        nodes = {node.name: node for node in model.graph}
        for site_id, scale in self._equalization.items():
            site = self._sites.site(site_id)
            for producer in site.producers:
                value = model.graph.initializers[producer.initializer]
                if producer.offset:
                    _widen(model, value)
                _divide(value, producer, site.producer_scale(scale), site)
            for path in site.consumers:
                linear = self._sites.linear(path)
                _multiply_rows(model, nodes[linear.node], linear, scale, site)
        return ir.passes.PassResult(model, modified=bool(self._equalization))


def _widen(model: ir.Model, value: ir.Value) -> None:
    """Store an initializer in the type that its only reader casts it to, and drop the Cast."""
    tensor = value.const_value
    uses = tuple(value.uses())
    if tensor is None or len(uses) != 1 or uses[0].node.op_type != "Cast":
        return
    cast = uses[0].node
    dtype = ir.DataType(cast.attributes.get_int("to"))
    shape = tuple(tensor.shape.numpy())
    value.const_value = lazy_tensor(value.name or "", dtype, shape, lambda: tensor.numpy().astype(dtype.numpy()))
    value.type = ir.TensorType(dtype)
    ir.convenience.replace_all_uses_with(cast.outputs[0], value)
    model.graph.remove(cast, safe=True)


def _divide(value: ir.Value, producer: Producer, scale: Real, site: FoldSite) -> None:
    def divided(array: Real) -> Real:
        shape = [1] * array.ndim
        shape[producer.axis] = -1
        offset = np.float32(producer.offset)
        if producer.span is None:
            return (array + offset) / scale.reshape(shape) - offset
        result = array.copy()
        part = np.moveaxis(result, producer.axis, -1)[..., slice(*producer.span)]
        part[...] = (part + offset) / scale - offset
        return result

    _replace(value, divided, site)


def _multiply_rows(model: ir.Model, node: ir.Node, linear: Linear, scale: Real, site: FoldSite) -> None:
    weight = model.graph.initializers[linear.weight]
    if not linear.weight_transposed and len(weight.uses()) == 1:
        _replace(weight, lambda array: array * scale[:, None], site)
        return
    tensor = weight.const_value
    if tensor is None:
        raise RuntimeError(f"initializer {linear.weight!r} has no value")
    shape = (linear.in_features, linear.out_features)

    def rows_of_clone(array: Real) -> Real:
        return (array.T if linear.weight_transposed else array) * scale[:, None]

    name = f"{linear.path}.equalized_weight"
    clone = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype))
    clone.const_value = lazy_tensor(name, tensor.dtype, shape, _rounded(tensor, rows_of_clone, site))
    model.graph.register_initializer(clone)
    before = node.inputs[1]
    node.replace_input_with(1, clone)
    transpose = before.producer() if before is not None else None
    if before is not None and transpose is not None and not before.uses():
        model.graph.remove(transpose, safe=True)


def _replace(value: ir.Value, change: Callable[[Real], Real], site: FoldSite) -> None:
    tensor = value.const_value
    if tensor is None or value.name is None or value.shape is None:
        raise RuntimeError(f"initializer {value.name!r} has no value")
    shape = value.shape.numpy()
    value.const_value = lazy_tensor(value.name, tensor.dtype, shape, _rounded(tensor, change, site))


def _rounded(tensor: ir.TensorProtocol, change: Callable[[Real], Real], site: FoldSite) -> Callable[[], Array]:
    """`change` in float32, rounded once to the tensor's type; refuses a result that the type cannot hold."""

    def compute() -> Array:
        with np.errstate(over="ignore"):
            result: Array = change(tensor.numpy().astype(np.float32)).astype(tensor.dtype.numpy())
        if not np.isfinite(result.astype(np.float32)).all():
            raise UserError(
                f"fold site {site.id}",
                f"folding the equalization into {tensor.name!r} overflows {tensor.dtype.name}",
                "use --dtype bf16, or set the layers that read it to per_token in policy.json",
            )
        return result

    return compute
