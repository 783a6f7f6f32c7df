"""`config.pbtxt` of an engine: Triton's own message, filled in from what the engine is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fptq_export.errors import UserError
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.plan_facts import CacheTensor, PlanFacts, PlanTensor
from fptq_export.triton.protobuf import data_type, model_config_module

__all__ = ["check_stateful", "plan_config"]

_IDS, _POSITIONS, _MASK = "input_ids", "position_ids", "attention_mask"
_PAST_AXIS = 1
"""Of a cache [heads, past, size], without the batch."""


def plan_config(name: str, facts: PlanFacts, options: TritonOptions, *, versions: int) -> Any:
    """The config of the model that runs an engine.

    Args:
        name: Of the model.
        facts: Of the engine.
        options: Instances, delays, and whether the server keeps the cache.
        versions: Newest versions that stay loaded.

    Returns:
        `model_config_pb2.ModelConfig`.

    Raises:
        UserError: The server cannot keep this engine's cache, or tritonclient is not installed.
    """
    config = model_config_module().ModelConfig(
        name=name, platform="tensorrt_plan", backend="tensorrt", max_batch_size=facts.max_batch_size
    )
    config.default_model_filename = "model.plan"
    config.version_policy.latest.num_versions = versions
    group = config.instance_group.add(count=options.instances)
    group.kind = group.KIND_GPU
    stateful = options.variant == "stateful"
    inputs = (*facts.inputs, *(() if stateful else (item.past for item in facts.cache)))
    for tensor in inputs:
        _add_tensor(config.input.add(), tensor)
    presents = () if stateful else tuple(_present(item) for item in facts.cache)
    for tensor in (*facts.outputs, *presents):
        _add_tensor(config.output.add(), tensor)
    if stateful:
        check_stateful(facts)
        _add_sequences(config, facts, options)
    elif facts.max_batch_size > 1:
        config.dynamic_batching.max_queue_delay_microseconds = options.max_queue_delay
    if facts.cache_kind == "static":
        _add_cuda_graph(config, facts, inputs)
    for tokens in _warm_up_lengths(facts):
        _add_warm_up(config, facts, inputs, tokens)
    return config


def check_stateful(facts: PlanFacts) -> None:
    """Refuse an engine whose cache Triton cannot keep between calls.

    Raises:
        UserError: Its cache grows, it has none, or an output has no batch in front.
    """
    if facts.batch_dims:
        reason = "not every output has the batch in front, as range_monitor has not, and Triton batches its sequences"
        hint = "fptq-export rewrite DIR --no-emit-range-outputs and build again, or take --variant stateless"
        raise UserError("--variant stateful", reason, hint)
    if facts.cache_kind == "static":
        return
    reason = {
        "concat": "its KV cache grows with every call, and Triton's state starts with one row and keeps its shape",
        "none": "it has no KV cache",
    }[facts.cache_kind]
    hint = "export the model with --kv-cache static, or take --variant stateless"
    raise UserError("--variant stateful", reason, hint)


def _present(item: CacheTensor) -> PlanTensor:
    return item.past.model_copy(update={"name": item.present, "optimum": ()})


def _add_tensor(field: Any, tensor: PlanTensor) -> None:
    field.name = tensor.name
    field.data_type = data_type(tensor.data_type)
    if tensor.dims:
        field.dims.extend(tensor.dims)
    else:  # one value a sequence: Triton wants a dimension, the engine has none
        field.dims.append(1)
        field.reshape.SetInParent()


def _add_sequences(config: Any, facts: PlanFacts, options: TritonOptions) -> None:
    """Keep the cache of each sequence on the GPU, in one buffer that the engine writes in place.

    `oldest` batches whatever calls of different sequences have the same shape, and needs no control inputs, which the
    engine does not have.
    """
    batching = config.sequence_batching
    batching.max_sequence_idle_microseconds = options.max_sequence_idle * 1_000_000
    batching.oldest.max_candidate_sequences = options.max_sequences
    batching.oldest.max_queue_delay_microseconds = options.max_queue_delay
    for item in facts.cache:
        state = batching.state.add(input_name=item.past.name, output_name=item.present)
        state.data_type = data_type(item.past.data_type)
        state.dims.extend(item.past.dims)
        state.use_same_buffer_for_input_output = True
        initial = state.initial_state.add(name=f"{item.past.name}.zero", zero_data=True)
        initial.data_type = state.data_type
        initial.dims.extend(item.past.dims)


def _add_cuda_graph(config: Any, facts: PlanFacts, inputs: Sequence[PlanTensor]) -> None:
    """Capture the decode step: with a static cache all its shapes are known."""
    cuda = config.optimization.cuda
    cuda.graphs = True
    spec = cuda.graph_spec.add(batch_size=min(1, facts.max_batch_size))  # 0 where Triton knows of no batch
    for tensor in inputs:
        spec.input[tensor.name].dim.extend(_shape(tensor, facts, tokens=1))


def _warm_up_lengths(facts: PlanFacts) -> tuple[int, ...]:
    """Tokens of the calls that warm an engine up: a prompt and a decode step; one call where there is no cache."""
    tokens = next((item.optimum[-1] for item in facts.inputs if item.name == _IDS), 1)
    return (tokens,) if facts.cache_kind == "none" else tuple(dict.fromkeys((tokens, 1)))


def _add_warm_up(config: Any, facts: PlanFacts, inputs: Sequence[PlanTensor], tokens: int) -> None:
    sample = config.model_warmup.add(name=f"{tokens} tokens", batch_size=1)
    for tensor in inputs:
        item = sample.inputs[tensor.name]
        item.data_type = data_type(tensor.data_type)
        item.dims.extend(_shape(tensor, facts, tokens))
        item.zero_data = True


def _shape(tensor: PlanTensor, facts: PlanFacts, tokens: int) -> list[int]:
    """The shape of an input in a call of so many tokens behind a cache of the optimal length.

    As in the config: without the batch, or with a batch of 1 in front.
    """
    skip = facts.batch_dims
    past = facts.cache[0].past.optimum[_PAST_AXIS + skip] if facts.cache else 0
    varying = {_IDS: tokens, _POSITIONS: tokens, _MASK: past + tokens}
    by_name = varying if facts.cache_kind != "none" else {}
    sizes = zip(tensor.dims[skip:], tensor.optimum[skip:], strict=True)
    return [1] * skip + [by_name.get(tensor.name, size) if dim < 0 else dim for dim, size in sizes] or [1]
