"""The form of a portable graph that ONNX Runtime runs fast on a CPU with our operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from fptq_export.graph_io import load_graph
from fptq_export.rewrite.cache_in_place import CacheInPlace
from fptq_export.rewrite.functions import W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.fuse_attention import FuseAttention
from fptq_export.rewrite.fuse_prologue import FusePrologue
from fptq_export.rewrite.fuse_rms_norm import FuseRmsNorm
from fptq_export.rewrite.fuse_rotary import FuseRotary
from fptq_export.rewrite.fuse_skip_norm import FuseSkipNorm
from fptq_export.rewrite.last_token_logits import LastTokenLogits
from fptq_export.rewrite.lower_to_cpu import CPU_DOMAIN, HALF_LINEAR, LowerToCpu
from fptq_export.rewrite.widen_to_float import WidenToFloat

__all__ = ["CpuForm", "cpu_form_from_path"]

_OPSET = 23
"""`RMSNormalization` and `RotaryEmbedding` came with it."""
_FLOATS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT})
_NARROW_INPUTS = (
    *((CPU_DOMAIN, W4A8_STATIC, index) for index in (3, 5, 7)),
    *((CPU_DOMAIN, W4A8_PER_TOKEN, index) for index in (2, 4, 6)),
    (CPU_DOMAIN, HALF_LINEAR, 1),
)
"""Group scales, and the weight of the head."""


@dataclass(frozen=True)
class CpuForm:
    """A graph for the operators of `plugins/cpu/ort_ops.cpp`."""

    graph: bytes
    """Protobuf; weights that stay as they are lie beside the portable graph."""
    lowered: Mapping[str, str]
    """Torch path -> operator that runs it; `FusePrologue` may have put a norm or a gate before it."""
    left_alone: Mapping[str, str]
    """Torch path or attention -> why it runs as in the portable graph."""
    cache_in_place: bool
    """Whether keys and values are written where the caller keeps them."""


def cpu_form_from_path(path: Path) -> CpuForm:
    """Bring a portable graph into the form; its logits are those of the last token.

    Raises:
        UserError: The graph cannot be read, or its head is not found.
    """
    model = _opened(path)
    attention, cache, lower = FuseAttention(_FLOATS), CacheInPlace(), LowerToCpu()
    _apply(model, FuseRotary(), attention, cache)
    if not cache.fused:  # attention as one operator pays where it spares the copy of the cache, and only there
        model = _opened(path)
    _apply(model, FuseRmsNorm(), lower, WidenToFloat(_NARROW_INPUTS), FuseSkipNorm(), FusePrologue())
    common.RemoveUnusedNodesPass()(model)
    left_alone = {**attention.left_alone, **cache.left_alone, **lower.left_alone}
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return CpuForm(serialized, lower.lowered, left_alone, cache.fused > 0)


def _apply(model: ir.Model, *rewrites: ir.passes.InPlacePass) -> None:
    for rewrite in rewrites:
        rewrite(model)


def _opened(path: Path) -> ir.Model:
    model = load_graph(path)
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if logits is None or logits.shape is None or logits.shape[1] != 1:
        LastTokenLogits()(model)
    model.graph.opset_imports[""] = max(model.graph.opset_imports[""], _OPSET)
    return model
