"""One layer of a run as a graph of its own, with real inputs and the float layer's answer, for Polygraphy.

onnx-graphsurgeon cannot write INT4, which every such layer has, so onnx_ir cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from fptq_export.debug.graph_linears import GraphLinear
from fptq_export.debug.sessions import extracted
from fptq_export.files import atomic_path
from fptq_export.graph_io import save_graph

__all__ = ["LEAST_COSINE", "CutFiles", "write_cut"]

LEAST_COSINE = 0.95
"""Of a layer and its float answer: INT4 in groups leaves 0.98 and more, and codes that are wrong less than 0.9."""
_INPUT, _OUTPUT = "x", "y"


@dataclass(frozen=True)
class CutFiles:
    """What was written."""

    graph: Path
    """`x` [rows, in] -> `y` [rows, out], without the bias; weights are inside."""
    inputs: Path
    """For `polygraphy run --load-inputs`."""
    outputs: Path
    """For `--load-outputs`: the float layer on the same input."""


def write_cut(
    model: ir.Model, linear: GraphLinear, x: NDArray[Any], weight: NDArray[np.float32], directory: Path
) -> CutFiles:
    """Cut one linear out.

    Args:
        model: The graph of the run.
        linear: One of its quantized linears.
        x: What it reads there, [rows, in] in the type of the graph.
        weight: The float weight that it stands for, times its fold scales, float32 [in, out].
        directory: Where the files go.
    """
    files = CutFiles(directory / "layer.onnx", directory / "inputs.json", directory / "outputs.json")
    layer = extracted(model, (linear.x,), (linear.y,))
    (source,), (target,) = layer.graph.inputs, layer.graph.outputs
    for value, name, channels in ((source, _INPUT, weight.shape[0]), (target, _OUTPUT, weight.shape[1])):
        value.name, value.shape = name, ir.Shape(["rows", channels])
        value.type = ir.TensorType(linear.dtype)
    save_graph(ir.external_data.load_to_model(layer), files.graph)
    # In the graph's type, as the layer's own output is: rounding to it is not the layer's error.
    y = (x.astype(np.float32) @ weight).astype(x.dtype)
    answer = IterationResult(outputs={_OUTPUT: y}, runner_name="float")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        with atomic_path(files.inputs) as partial:
            save_json([{_INPUT: x}], str(partial))
        with atomic_path(files.outputs) as partial:
            RunResults([("float", [answer])]).save(str(partial))
    return files
