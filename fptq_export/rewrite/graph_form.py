"""What the caller of the written graphs sees: passes that change inputs and outputs, and those that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import onnx_ir.passes.common as common

from fptq_export.graph_io import load_graph
from fptq_export.rewrite.fuse_attention import FuseAttention
from fptq_export.rewrite.fuse_rms_norm import FuseRmsNorm
from fptq_export.rewrite.fuse_rotary import FuseRotary
from fptq_export.rewrite.last_token_logits import LastTokenLogits
from fptq_export.rewrite.quantize_cache import QuantizeCache
from fptq_export.rewrite.static_cache import StaticCache

__all__ = ["GraphForm", "bring_into_form", "check_form"]


@dataclass(frozen=True)
class GraphForm:
    """Inputs and outputs of the written graphs."""

    logits: Literal["all", "last"] = "all"
    """Logits of every token of a call, [B, S, V], or of the last one, [B, 1, V]."""
    kv_cache: Literal["concat", "static"] = "concat"
    """A cache that grows with every call, or one of fixed length that is written at `write_indices`."""
    kv_dtype: Literal["float", "int8"] = "float"
    """Keys and values in the type of the graph, or INT8 codes with a scale for each head of a token."""


def check_form(path: Path, form: GraphForm) -> None:
    """Refuse a traced graph that cannot be brought into a form; takes moments, reads no weight and writes nothing.

    Raises:
        UserError: As `bring_into_form`.
    """
    if form != GraphForm():
        bring_into_form(load_graph(path), form)


def bring_into_form(model: ir.Model, form: GraphForm) -> dict[str, Any]:
    """Change a traced graph, in place.

    The static form is written in the operators that TensorRT runs in one kernel each. The growing form stays as traced,
    in opset 21, which older ONNX tools read.

    Args:
        model: A graph as trace writes it; its linears keep their names, so `sites.json` still describes it.
        form: What is asked for.

    Returns:
        For the summary of the stage: how many patterns each operator replaced, and which attentions stay, and why.

    Raises:
        UserError: The graph cannot be brought into the form.
    """
    if form.logits == "last":
        LastTokenLogits()(model)
    summary = _with_static_cache(model) if form.kv_cache == "static" else {}
    if form.kv_dtype == "int8":
        QuantizeCache()(model)
    return summary


def _with_static_cache(model: ir.Model) -> dict[str, Any]:
    norm, rotary, attention = FuseRmsNorm(), FuseRotary(), FuseAttention()
    StaticCache()(model)
    for fuse in (norm, rotary, attention):
        fuse(model)
    common.RemoveUnusedNodesPass()(model)
    return {
        "fused": {
            "RMSNormalization": norm.fused,
            "RotaryEmbedding": rotary.fused,
            "Attention": attention.fused,
        },
        "attention_left_alone": dict(attention.left_alone),
    }
