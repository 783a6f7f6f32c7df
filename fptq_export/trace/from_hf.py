"""A Hugging Face causal language model -> an ONNX graph with a KV cache and no weights in memory.

The model is built from its config under `FakeTensorMode`, so tracing costs the same memory for 135M as for 70B
parameters; `weights.attach_weights` points the initializers at the checkpoint afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from torch import nn
from torch.nn import Conv1d
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from fptq_export.errors import UserError
from fptq_export.experts.unstack import unstack_experts
from fptq_export.trace.fake_tracing import fake_tracing
from fptq_export.trace.graph_names import name_dimensions, name_initializers
from fptq_export.trace.model_linears import LinearRole, linears_from_model, roles_from_model

__all__ = [
    "OPSET",
    "SAMPLE_BATCH",
    "SAMPLE_SEQUENCE",
    "TORCH_DTYPES",
    "KeyValue",
    "TracedModel",
    "computed_buffers",
    "graph_with_cache",
    "keys_and_values",
    "refuse_stacked_weights",
    "run_with_cache",
    "sample_inputs",
    "sample_past",
    "tied_parameters",
    "traced_from_config",
    "user_errors_from_torch",
]

OPSET = 21
"""First opset with INT4 and `block_size` in DequantizeLinear."""
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MATRIX_RANK = 2
SAMPLE_BATCH, SAMPLE_SEQUENCE, _SAMPLE_PAST = 2, 3, 5
"""Sample sizes: all different and above 1, so that no two dimensions are taken for one and none is specialized."""


_ONLY_DECODERS = "export a decoder with attention in every layer"

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer, each [batch, heads, past, head_dim]."""


@dataclass(frozen=True)
class TracedModel:
    """A traced graph and what is needed to give it its weights.

    Attributes:
        graph: Initializers named by torch path (`model.layers.0.self_attn.q_proj.weight`), without values.
        buffers: Values of buffers that no checkpoint holds (rotary frequencies), by torch path.
        tied: Parameter path -> path of the parameter it shares storage with.
        linears: Every linear of the model, torch path -> (in_features, out_features).
        roles: What is special about some of them.
        max_sequence: Most tokens of a sequence that the model's code takes, where torch found a limit in it.
        outside: Torch paths of modules with weights that the graph is not meant to hold.
    """

    graph: ir.Model
    buffers: Mapping[str, NDArray[np.generic]]
    tied: Mapping[str, str]
    linears: Mapping[str, tuple[int, int]]
    roles: Mapping[str, LinearRole]
    max_sequence: int | None = None
    outside: tuple[str, ...] = ()


class _FlatCausalLM(nn.Module):
    """The model with its cache as plain tensors: what an ONNX graph can take and give."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[KeyValue],
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """Logits [batch, sequence, vocab], and keys and values [batch, heads, total, head_dim] of every layer."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return run_with_cache(self.wrapped, inputs, past_key_values)


def run_with_cache(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], past_key_values: list[KeyValue]
) -> tuple[torch.Tensor, list[KeyValue]]:
    """Logits, and the cache after a call, as plain tensors.

    Args:
        model: A causal language model.
        inputs: What it is called with beside the cache.
        past_key_values: The cache before the call.
    """
    cache = DynamicCache(past_key_values)
    output = model(**inputs, past_key_values=cache, use_cache=True)
    return output.logits, keys_and_values(cache)


def traced_from_config(config: PretrainedConfig, dtype: str, *, trust_remote_code: bool = False) -> TracedModel:
    """Trace a causal language model from its config alone.

    Args:
        config: Config of the model; its weights are not needed.
        dtype: `fp16`, `bf16` or `fp32`: the type of weights and activations. Norms and softmax keep the float32
            arithmetic that the model's code asks for.
        trust_remote_code: Whether code from the model repository may run.

    Returns:
        The graph with inputs `input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key/value` and outputs
        `logits`, `present.N.key/value`; batch, sequence and past length are dynamic.

    Raises:
        UserError: The architecture is not a causal language model, or torch cannot trace it.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    torch_dtype = TORCH_DTYPES[dtype]
    with fake_tracing():
        model = _empty_model(config, torch_dtype, trust_remote_code)
        unstack_experts(model, static=True)
        refuse_stacked_weights(model)
        with user_errors_from_torch(model):
            ids = torch.zeros(SAMPLE_BATCH, SAMPLE_SEQUENCE, dtype=torch.long)
            cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
            past = sample_past(model, torch_dtype, cache)
            graph = graph_with_cache(_FlatCausalLM(model), sample_inputs(), past)
    name_initializers(graph)
    tokens = ("batch", "sequence")
    names = {"input_ids": tokens, "position_ids": tokens, "attention_mask": ("batch", "total")}
    name_dimensions(graph, names)
    return TracedModel(
        graph,
        computed_buffers(lambda: _empty_model(config, torch_dtype, trust_remote_code)),
        tied_parameters(model),
        linears_from_model(model),
        roles_from_model(model),
    )


def _empty_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(
            f"model type {config.model_type!r}",
            f"is not a causal language model that transformers knows ({str(error).splitlines()[0]})",
            "export a decoder model (LLaMA, Mistral, Qwen, ...)",
        ) from error
    return model.eval()


@contextmanager
def user_errors_from_torch(model: nn.Module) -> Iterator[None]:
    """Say that an architecture cannot be traced where torch raises."""
    try:
        yield
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        raise UserError(
            type(model).__name__,
            f"torch.onnx cannot trace this architecture ({str(error).splitlines()[0]})",
            "update torch and transformers, or report the architecture",
        ) from error


def refuse_stacked_weights(model: nn.Module, *, convolutions: bool = False) -> None:
    """What `unstack_experts` leaves stacked is no linear: it would stay in float without a word.

    Args:
        model: The model.
        convolutions: Whether convolutions are known to stand before its blocks, and may stay in float.
    """
    known = {f"{path}.weight" for path, module in model.named_modules() if convolutions and isinstance(module, Conv1d)}
    parameters = ((name, parameter) for name, parameter in model.named_parameters() if name not in known)
    stacked = [name for name, parameter in parameters if parameter.dim() > _MATRIX_RANK]
    if stacked:
        raise UserError(
            type(model).__name__,
            f"holds {len(stacked)} weights of more than two dimensions ({stacked[0]}, ...), as of experts",
            "export a dense decoder: this version would leave those weights in float",
        )


def sample_past(model: nn.Module, dtype: torch.dtype, cache: object) -> list[KeyValue]:
    """A cache of every layer; heads and head sizes come from a fake forward pass rather than from config names.

    Args:
        model: For errors.
        dtype: Of keys and values.
        cache: What the forward pass returned, of a batch of `SAMPLE_BATCH`.

    Raises:
        UserError: It is no cache of keys and values.
    """
    if not isinstance(cache, DynamicCache):
        state = "keeps no key-value cache" if cache is None else f"keeps its state in {type(cache).__name__}"
        raise UserError(type(model).__name__, state, _ONLY_DECODERS)

    def sample(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(SAMPLE_BATCH, tensor.shape[1], _SAMPLE_PAST, tensor.shape[3], dtype=dtype)

    return [(sample(keys), sample(values)) for keys, values in keys_and_values(cache)]


def keys_and_values(cache: DynamicCache) -> list[KeyValue]:
    """Keys and values of every layer. Raises UserError when a layer keeps something else."""
    pairs: list[KeyValue] = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise UserError(f"layer {index}", f"keeps its state in {type(layer).__name__}", _ONLY_DECODERS)
        pairs.append((keys, values))
    return pairs


def sample_inputs() -> dict[str, torch.Tensor]:
    """Samples of the inputs before the cache."""
    ids = torch.zeros(SAMPLE_BATCH, SAMPLE_SEQUENCE, dtype=torch.long)
    mask = torch.ones(SAMPLE_BATCH, _SAMPLE_PAST + SAMPLE_SEQUENCE, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.zeros_like(ids)}


def graph_with_cache(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    past: Sequence[KeyValue],
    fixed: Collection[str] = (),
) -> ir.Model:
    """Trace a module that takes tensors and a cache, and gives logits and the cache after them.

    Args:
        module: Called with the tensors in order, then with `past`.
        inputs: Name -> sample; the first two dimensions of each are dynamic.
        past: Sample of the cache.
        fixed: Inputs of which only the first dimension is.
    """
    any_size = torch.export.Dim.AUTO
    tokens, cached, layers = {0: any_size, 1: any_size}, {0: any_size, 2: any_size}, len(past)
    shapes = [{0: any_size} if name in fixed else tokens for name in inputs]
    program = torch.export.export(
        module,
        (*inputs.values(), past),
        dynamic_shapes=(*shapes, [(cached, cached)] * layers),
        strict=False,
    )
    exported = torch.onnx.export(
        program,
        (),
        input_names=[*inputs, *_cache_names("past_key_values", layers)],
        output_names=["logits", *_cache_names("present", layers)],
        opset_version=OPSET,
        optimize=False,
        verbose=False,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return exported.model


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def computed_buffers(build: Callable[[], nn.Module]) -> dict[str, NDArray[np.generic]]:
    """Values of the buffers that a model computes when it is built; its parameters stay on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = build()
    return {
        name: buffer.float().numpy() if buffer.dtype == torch.bfloat16 else buffer.numpy()
        for name, buffer in model.named_buffers()
        if buffer.device.type == "cpu"
    }


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Parameter path -> path of the parameter it shares storage with."""
    first_name: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first_name.setdefault(id(parameter), name) != name:
            tied[name] = first_name[id(parameter)]
    return tied
