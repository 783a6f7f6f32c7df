"""A Hugging Face causal language model -> an ONNX graph with a KV cache and no weights in memory.

The model is built from its config under `FakeTensorMode`, so tracing costs the same memory for 135M as for 70B
parameters; `weights.attach_weights` points the initializers at the checkpoint afterwards.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from fptq_export.errors import UserError

__all__ = ["OPSET", "TORCH_DTYPES", "TracedModel", "traced_from_config"]

OPSET = 21
"""First opset with INT4 and `block_size` in DequantizeLinear."""
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_WRAPPER = "wrapped"
_SAMPLE_BATCH, _SAMPLE_SEQUENCE, _SAMPLE_PAST = 2, 3, 5
"""Sample sizes: all different and above 1, so that no two dimensions are taken for one and none is specialized."""


@dataclass(frozen=True)
class TracedModel:
    """A traced graph and what is needed to give it its weights.

    Attributes:
        graph: Initializers named by torch path (`model.layers.0.self_attn.q_proj.weight`), without values.
        buffers: Values of buffers that no checkpoint holds (rotary frequencies), by torch path.
        tied: Parameter path -> path of the parameter it shares storage with.
        linears: Every `nn.Linear` of the model, torch path -> (in_features, out_features).
    """

    graph: ir.Model
    buffers: Mapping[str, NDArray[np.generic]]
    tied: Mapping[str, str]
    linears: Mapping[str, tuple[int, int]]


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
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Logits [batch, sequence, vocab] and the grown cache, one (key, value) [batch, heads, total, head_dim] a layer."""
        cache = DynamicCache(past_key_values)
        output = self.wrapped(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


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
    config._attn_implementation = "eager"
    torch_dtype = TORCH_DTYPES[dtype]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode, torch.no_grad(), _quiet():
        model = _empty_model(config, torch_dtype, trust_remote_code)
        cache_shapes = _cache_shapes(model)
        graph = _graph_from_module(_FlatCausalLM(model), _sample_inputs(cache_shapes, torch_dtype), len(cache_shapes))
    _name_initializers(graph)
    _name_dimensions(graph)
    return TracedModel(graph, _buffers(config, torch_dtype, trust_remote_code), _tied_parameters(model), _linears(model))


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


def _cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(heads, head_dim) of every cached layer, read from a fake forward pass rather than from config names."""
    ids = torch.zeros(_SAMPLE_BATCH, _SAMPLE_SEQUENCE, dtype=torch.long)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    if not isinstance(cache, DynamicCache):
        raise UserError(
            type(model).__name__, f"keeps its state in {type(cache).__name__}, not in a key-value cache",
            "only attention decoders can be exported",
        )
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]


def _sample_inputs(cache_shapes: list[tuple[int, int]], dtype: torch.dtype) -> tuple[object, ...]:
    ids = torch.zeros(_SAMPLE_BATCH, _SAMPLE_SEQUENCE, dtype=torch.long)
    mask = torch.ones(_SAMPLE_BATCH, _SAMPLE_PAST + _SAMPLE_SEQUENCE, dtype=torch.long)
    past = [
        tuple(torch.zeros(_SAMPLE_BATCH, heads, _SAMPLE_PAST, head_dim, dtype=dtype) for _ in range(2))
        for heads, head_dim in cache_shapes
    ]
    return ids, mask, torch.zeros_like(ids), past


def _graph_from_module(module: nn.Module, sample: tuple[object, ...], layers: int) -> ir.Model:
    any_size = torch.export.Dim.AUTO
    tokens = {0: any_size, 1: any_size}
    past = {0: any_size, 2: any_size}
    try:
        program = torch.export.export(
            module, sample, dynamic_shapes=(tokens, tokens, tokens, [(past, past)] * layers), strict=False
        )
        exported = torch.onnx.export(
            program,
            (),
            input_names=["input_ids", "attention_mask", "position_ids", *_cache_names("past_key_values", layers)],
            output_names=["logits", *_cache_names("present", layers)],
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        raise UserError(
            type(module.wrapped).__name__,
            f"torch.onnx cannot trace this architecture ({str(error).splitlines()[0]})",
            "update torch and transformers, or report the architecture",
        ) from error
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return exported.model


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _name_initializers(graph: ir.Model) -> None:
    """`wrapped.model.layers...` -> `model.layers...`: the names of the checkpoint."""
    for value in list(graph.graph.initializers.values()):
        if value.name is not None:
            value.name = value.name.removeprefix(f"{_WRAPPER}.")


def _name_dimensions(graph: ir.Model) -> None:
    """Give dynamic dimensions the names people look for in the file, everywhere in the graph."""
    tokens = ("batch", "sequence")
    names = {"input_ids": tokens, "position_ids": tokens, "attention_mask": ("batch", "total")}
    symbols: dict[str, str] = {}
    for value in graph.graph.inputs:
        wanted = names.get(value.name or "", ("batch", None, "past", None))
        for name, dim in zip(wanted, value.shape or (), strict=True):
            if name is not None:
                symbols[str(dim)] = name
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else _renamed(str(dim), symbols) for dim in value.shape])


def _values(graph: ir.Model) -> Iterator[ir.Value]:
    yield from graph.graph.inputs
    for node in graph.graph:
        yield from node.outputs


def _renamed(expression: str, symbols: Mapping[str, str]) -> str:
    """`s17 + s70` -> `past + sequence`."""
    return re.sub(r"\w+", lambda match: symbols.get(match[0], match[0]), expression)


def _buffers(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> dict[str, NDArray[np.generic]]:
    """Values of the buffers that the model computes when it is built; its parameters stay on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return {
        name: buffer.float().numpy() if buffer.dtype == torch.bfloat16 else buffer.numpy()
        for name, buffer in model.named_buffers()
        if buffer.device.type == "cpu"
    }


def _tied_parameters(model: nn.Module) -> dict[str, str]:
    first_name: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first_name.setdefault(id(parameter), name) != name:
            tied[name] = first_name[id(parameter)]
    return tied


def _linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence notes of torch's exporter that name nothing the user could change."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
