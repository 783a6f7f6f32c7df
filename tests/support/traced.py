"""Traced tiny models and ways to run them, shared by the tests of trace and rewrite."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from fptq_export.progress import NoProgress
from fptq_export.sites import Sites, read_sites
from fptq_export.stored_tensor import StoredTensor
from fptq_export.trace import trace

__all__ = [
    "FP32_LOGITS",
    "Traced",
    "causal_feed",
    "encoder_feed",
    "run",
    "stored_tensors",
    "token_feed",
    "torch_hidden",
    "torch_logits",
    "traced_once",
]

FP32_LOGITS = 32 * 128**0.5 * 2.0**-24
"""Difference of two float32 programs for one model, relative to the largest logit: some 32 operations in a row lie
between ids and logits of two layers, each a sum of at most 128 terms whose roundings of 2^-24 add up like a random
walk: 2.2e-5. Measured: 2e-6."""

_ELEMENT_TYPES: Mapping[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
    onnx.TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    onnx.TensorProto.INT64: np.dtype(np.int64),
}


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        model: `model.onnx`; its data lies beside it.
        sites: What trace returned.
        checkpoint: The Hugging Face directory it was made from.
        dtype: `fp16`, `bf16` or `fp32`.
    """

    model: Path
    sites: Sites
    checkpoint: Path
    dtype: str


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Tensor name -> where it is stored."""
    from calib.load import checkpoint_from_directory

    tensors = checkpoint_from_directory(directory, directory.name).tensors
    return {name: entry.stored for name, entry in tensors.items()}


def traced_once(directory: Path, dtype: str) -> Traced:
    """Trace a checkpoint into a directory beside it, unless a test of this session has done so."""
    from transformers import AutoConfig

    target = directory.with_name(f"{directory.name}-traced-{dtype}")
    model, sites = target / "model.onnx", target / "sites.json"
    if not sites.exists():  # written last
        trace(AutoConfig.from_pretrained(directory), stored_tensors(directory), dtype, model, sites, NoProgress())
    return Traced(model, read_sites(sites), directory, dtype)


def causal_feed(
    graph: Path, ids: NDArray[np.int64], past: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs of a causal graph: ids [batch, sequence], all visible, after a past or an empty one."""
    batch, sequence = ids.shape
    feed: dict[str, NDArray[Any]] = dict(past or {})
    for value in onnx.load(graph, load_external_data=False).graph.input:
        if value.name.startswith("past_key_values.") and past is None:
            tensor = value.type.tensor_type
            _, heads, _, size = (dim.dim_value for dim in tensor.shape.dim)
            feed[value.name] = np.zeros((batch, heads, 0, size), _ELEMENT_TYPES[tensor.elem_type])
    length = next(array.shape[2] for name, array in feed.items() if name.startswith("past"))
    feed["input_ids"] = ids
    feed["attention_mask"] = np.ones((batch, length + sequence), np.int64)
    feed["position_ids"] = np.tile(np.arange(length, length + sequence), (batch, 1))
    return feed


def encoder_feed(ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None, **more: Any) -> dict[str, NDArray[Any]]:
    """Inputs of an encoder's graph: ids [batch, sequence], all of them tokens where no mask is given."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask, **more}


def token_feed(graph: Path, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Inputs of any traced graph: ids [batch, sequence], all visible, after an empty past or of one segment."""
    names = {value.name for value in onnx.load(graph, load_external_data=False).graph.input}
    if "position_ids" in names:
        return causal_feed(graph, ids)
    return encoder_feed(ids, **({"token_type_ids": np.zeros_like(ids)} if "token_type_ids" in names else {}))


def run(
    graph: Path,
    feed: Mapping[str, NDArray[Any]],
    *,
    optimized: bool = False,
    outputs: Sequence[str] | None = None,
    entries: Mapping[str, str] | None = None,
) -> dict[str, NDArray[Any]]:
    """Run a graph in ONNX Runtime on one thread.

    Args:
        graph: The file.
        feed: Input name -> array.
        optimized: All graph optimizations, or none at all.
        outputs: Names of the outputs; None for all.
        entries: Session configuration entries.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = list(outputs) if outputs is not None else [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def torch_logits(directory: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """FP32 logits of the checkpoint in torch, [batch, sequence, vocab]."""
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)).logits.numpy()
    return logits


def torch_hidden(directory: Path, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """FP32 hidden states of an encoder in torch, [batch, sequence, hidden]."""
    import torch
    from transformers import AutoModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        output = model(**{name: torch.from_numpy(array) for name, array in feed.items()})
    hidden: NDArray[np.float32] = output.last_hidden_state.numpy()
    return hidden
