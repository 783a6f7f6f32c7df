"""Inputs and reference logits of two calls, in the formats that Polygraphy and trtexec read.

Two folders, `prefill` (the head of the first window) and `decode` (one token behind it, with the cache), each with

* `inputs.json` and `outputs.json` for `polygraphy run --load-inputs inputs.json --load-outputs outputs.json`;
* one `NAME.bin` for each tensor, and `trtexec.args` with the options that name them.

trtexec reads `--loadInputs` and `--loadRefOutputs` alike: `name:file` pairs, each file the raw elements of the tensor
in C order and in the engine's own type, volume x element size bytes, with neither header nor shape (NVIDIA/TensorRT,
samples/common/sampleInference.cpp, `loadRefOutputsImpl`). The JSON that its `--exportOutput` writes is not read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptq_export.diff.record import Course, StoredLogits
from fptq_export.files import atomic_path, write_text
from fptq_export.graph_io import load_graph
from fptq_export.verify.all_logits import gives_last_only
from fptq_export.verify.polygraphy_diff import save_arrays, save_outputs
from fptq_export.verify.sessions import OnnxCausalSession

__all__ = ["ARGUMENTS_FILE", "INPUTS_FILE", "OUTPUTS_FILE", "SavedCall", "save_io", "trtexec_arguments"]

INPUTS_FILE, OUTPUTS_FILE, ARGUMENTS_FILE = "inputs.json", "outputs.json", "trtexec.args"
_LOGITS = "logits"


@dataclass(frozen=True)
class SavedCall:
    """One call of the graph, and what the reference says to the same tokens."""

    feed: Mapping[str, NDArray[Any]]
    """Every input, in the graph's types."""
    logits: NDArray[Any]
    """[1, S, V], or [1, 1, V] where the graph gives those of the last token; in the graph's type."""


def save_io(
    session: OnnxCausalSession,
    graph: Path,
    course: Course,
    reference: StoredLogits,
    reference_name: str,
    directory: Path,
) -> None:
    """Write the two calls.

    Args:
        session: Of the graph: its inputs, and the cache that its own prefill gives.
        graph: `model.w4a8.onnx`.
        course: Whose first window is used.
        reference: Logits of the same window.
        reference_name: What Polygraphy calls their source.
        directory: Created where it is missing.

    Raises:
        UserError: The graph cannot run, or has a type that Polygraphy's files cannot hold.
    """
    head = course.windows[:1, : course.head]
    token = course.windows[:1, course.head : course.head + 1]
    _, cache = session.prefill(head)
    rows = reference.prefill(0)[: course.head]
    rows = rows[-1:] if gives_last_only(graph) else rows
    dtype = _logits_dtype(graph)
    calls = {
        "prefill": SavedCall(session.prefill_feed(head), rows[None].astype(dtype)),
        "decode": SavedCall(session.decode_feed(token, cache), reference.decode(0)[None, :1].astype(dtype)),
    }
    for name, call in calls.items():
        _write(call, reference_name, directory / name)


def trtexec_arguments(call: SavedCall) -> str:
    """The options of one call; the files lie in the working directory. An empty past has a shape and no file."""
    shapes = ",".join(f"{name}:{'x'.join(map(str, array.shape))}" for name, array in call.feed.items())
    inputs = ",".join(f"{name}:{_binary(name)}" for name, array in call.feed.items() if array.size)
    return f"--shapes={shapes} --loadInputs={inputs} --loadRefOutputs={_LOGITS}:{_binary(_LOGITS)}"


def _write(call: SavedCall, reference_name: str, directory: Path) -> None:
    save_arrays(call.feed, directory / INPUTS_FILE)
    save_outputs(call.logits, reference_name, directory / OUTPUTS_FILE)
    for name, array in {**call.feed, _LOGITS: call.logits}.items():
        if array.size:
            with atomic_path(directory / _binary(name)) as partial:
                np.ascontiguousarray(array).tofile(partial)
    write_text(trtexec_arguments(call) + "\n", directory / ARGUMENTS_FILE)


def _binary(name: str) -> str:
    return f"{name}.bin"


def _logits_dtype(graph: Path) -> np.dtype[Any]:
    (logits,) = (value for value in load_graph(graph).graph.outputs if value.name == _LOGITS)
    assert logits.dtype is not None, "ONNX Runtime opened the graph, so its outputs have types"
    return np.dtype(logits.dtype.numpy())
