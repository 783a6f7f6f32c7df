"""A KV cache of INT8 codes with one scale a head and token: about half the memory of an FP16 one."""

from __future__ import annotations

import re

import onnx_ir as ir
from onnx_ir.tape import Tape

from fptq_export.errors import UserError
from fptq_export.rewrite.functions import ELEMENT_TYPES, dequantized_per_token, per_token_codes
from fptq_export.rewrite.names import UniqueNames

__all__ = ["SCALE_SUFFIX", "QuantizeCache"]

SCALE_SUFFIX = "_scale"
"""`present.0.key` is read with `present.0.key_scale`."""

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_EXTENDING = ("Concat", "TensorScatter")
_RANK = 4


class QuantizeCache(ir.passes.InPlacePass):
    """Store keys and values as INT8 codes and scales, and read them back as code x scale.

    Rules:
        1. A cache `past` [B, H, past, D] of type T is extended into an output by one node, `Concat(past, new)` or
           `TensorScatter(past, new, write_indices)`. Input and output become INT8; beside each lies its scale, FLOAT
           [B, H, past, 1], named `<cache>_scale`, which a node of the same kind extends.
        2. New keys and values are quantized as a per-token activation is (`numerics.per_token_scale`), each head of a
           token on its own.
        3. Whatever read the extended cache reads code x scale, computed in float32 and rounded to T once: of new tokens
           too, so a prompt in one call and in several give the same.
        4. `Shape(past)` is left alone: the length is that of the codes. So are inputs that are no cache.
        5. A cache with another reader, or of a type that is not FLOAT, FLOAT16 or BFLOAT16, is refused with its name.

    Raises:
        UserError: Rule 5, or the graph has no cache.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every cache."""
        caches = [value for value in model.graph.inputs if _PAST.fullmatch(value.name or "")]
        if not caches:
            raise _refused("model", "has no KV cache")
        extended = [_extension(past) for past in caches]
        names = UniqueNames(model)
        for past, node in zip(caches, extended, strict=True):
            _quantize(model, past, node, names)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Every INT8 cache has its scale, before a call and after it."""
        found = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
        for past in [name for name in found if name is not None and _PAST.fullmatch(name)]:
            for name in (past, past.replace("past_key_values", "present")):
                types = (found.get(name), found.get(name + SCALE_SUFFIX))
                if types != (ir.DataType.INT8, ir.DataType.FLOAT):
                    raise ir.passes.PostconditionError(f"{name!r} and its scale are {types}")


def _refused(where: str, cause: str) -> UserError:
    return UserError(f"--kv-dtype int8: {where}", cause, "leave --kv-dtype out for this model")


def _extension(past: ir.Value) -> ir.Node:
    """Rules 1 and 5: the only node that reads what is in a cache."""
    if past.dtype not in ELEMENT_TYPES or past.shape is None or len(past.shape) != _RANK:
        raise _refused(f"{past.name}", f"is {past.dtype} {past.shape}, not a float [batch, heads, past, head size]")
    readers = [use for use in past.uses() if use.node.op_type != "Shape"]
    node = readers[0].node if len(readers) == 1 and readers[0].idx == 0 else None
    if node is None or node.domain or node.op_type not in _EXTENDING or past.is_graph_output():
        raise _refused(f"{past.name}", "is read by something else than the one node that extends it")
    present = node.outputs[0]
    if not present.is_graph_output() or node.attributes.get_int("axis", -2) not in (_RANK - 2, -2):
        raise _refused(f"{past.name}", f"is not extended along its tokens into an output by {node.name!r}")
    if node.op_type == "Concat" and len(node.inputs) != 2:
        raise _refused(f"{past.name}", f"is joined with {len(node.inputs) - 1} tensors in {node.name!r}")
    return node


def _quantize(model: ir.Model, past: ir.Value, node: ir.Node, names: UniqueNames) -> None:
    """Rules 1 to 3, for one cache."""
    present, dtype = node.outputs[0], past.dtype
    assert dtype is not None  # `_extension` has seen to it
    past_scale = _scale_beside(past)
    model.graph.inputs.insert(model.graph.inputs.index(past) + 1, past_scale)
    tape = Tape()
    new, rest = node.inputs[1], node.inputs[2:]
    assert new is not None
    codes, scale = per_token_codes(tape, new, dtype)
    attributes = dict(node.attributes)
    present_codes = tape.op(node.op_type, [past, codes, *rest], attributes)
    present_scale = tape.op(node.op_type, [past_scale, scale, *rest], attributes)
    dequantized = dequantized_per_token(tape, present_codes, present_scale, dtype)
    names.name_nodes(tape.nodes, f"{present.name}/int8")
    dequantized.type, dequantized.shape = ir.TensorType(dtype), present.shape
    _give_out(model, present, present_codes, present_scale)
    model.graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(present, dequantized)
    model.graph.remove(node, safe=True)
    past.type = ir.TensorType(ir.DataType.INT8)


def _scale_beside(cache: ir.Value) -> ir.Value:
    assert cache.shape is not None
    return ir.Value(
        name=f"{cache.name}{SCALE_SUFFIX}",
        shape=ir.Shape([*cache.shape[:-1], 1]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )


def _give_out(model: ir.Model, present: ir.Value, codes: ir.Value, scale: ir.Value) -> None:
    """Put codes and scale in the place of an output, under its name."""
    assert present.shape is not None
    place = model.graph.outputs.index(present)
    model.graph.outputs[place : place + 1] = [codes, scale]
    name = present.name
    present.name = f"{name}/float"
    codes.name, codes.type, codes.shape = name, ir.TensorType(ir.DataType.INT8), present.shape
    scale.name, scale.type = f"{name}{SCALE_SUFFIX}", ir.TensorType(ir.DataType.FLOAT)
    scale.shape = ir.Shape([*present.shape[:-1], 1])
