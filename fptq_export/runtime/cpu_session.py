"""The portable graph on a CPU: with our kernels where they are built, else in stock operators."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fptq_export.cpu.build import operators_path
from fptq_export.cpu.extension import BUILD_COMMAND
from fptq_export.errors import UserError
from fptq_export.rewrite.cpu_form import cpu_form_from_path
from fptq_export.rewrite.functions import W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.verify.in_place_session import InPlaceCausalSession
from fptq_export.verify.sessions import CausalSession, OnnxCausalSession, OrtForm

__all__ = ["Kernels", "cpu_session"]

Kernels = Literal["auto", "cpu", "stock"]
"""What computes the W4A8 linears: `fptq_export.cpu`, or the operators of ONNX Runtime."""
_W4A8 = frozenset({W4A8_STATIC, W4A8_PER_TOKEN})


def cpu_session(graph: Path, threads: int | None, kernels: Kernels = "auto") -> CausalSession:
    """Open a graph in ONNX Runtime; its name says what runs it.

    With our kernels, what lies between the linears is FLOAT whatever the type of the graph is, and the logits are those
    of the last token. Idle threads wait for work on their core, as is ONNX Runtime's own way.

    Args:
        graph: `model.w4a8.onnx` of a causal language model.
        threads: Threads inside an operator; None lets ONNX Runtime take every core.
        kernels: `auto` takes `cpu` where they are built and the graph has W4A8 linears.

    Raises:
        UserError: The graph cannot be opened; or `cpu` is asked for, and the kernels are not built, or have nothing to
            do.
    """
    is_built = operators_path().is_file()
    if kernels == "cpu" and not is_built:
        raise UserError("fptq_export.cpu", "its operators for ONNX Runtime are not built", f"run {BUILD_COMMAND}")
    if kernels == "stock" or not is_built:
        return OnnxCausalSession(graph, threads=threads, name=f"{graph.name} (stock operators)", spin=True)
    form = cpu_form_from_path(graph)
    if not _W4A8.intersection(form.lowered.values()):
        if kernels == "cpu":
            cause = "has no W4A8 linear that the CPU kernels run"
            raise UserError(str(graph), cause, "open model.w4a8.onnx of a run, or leave the kernels at auto")
        return OnnxCausalSession(graph, threads=threads, name=f"{graph.name} (stock operators)", spin=True)
    name, ort_form = f"{graph.name} (CPU kernels)", OrtForm(form.graph, operators_path())
    if form.cache_in_place:
        return InPlaceCausalSession(graph, ort_form, threads=threads, name=name, spin=True)
    return OnnxCausalSession(graph, threads=threads, name=name, form=ort_form, spin=True)
