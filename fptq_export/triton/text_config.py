"""`config.pbtxt` of a text model: text in, text out, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fptq_export.triton.options import TritonOptions
from fptq_export.triton.protobuf import data_type, model_config_module

__all__ = ["ANY_LENGTH", "INPUTS", "OUTPUTS", "parameter_of", "text_config"]

ANY_LENGTH = -1
INPUTS: Mapping[str, tuple[str, int]] = {
    "text_input": ("STRING", 1),
    "stream": ("BOOL", 1),
    "max_tokens": ("INT32", 1),
    "temperature": ("FP32", 1),
    "top_k": ("INT32", 1),
    "top_p": ("FP32", 1),
    "seed": ("INT64", 1),
    "stop": ("STRING", ANY_LENGTH),
    "ignore_eos": ("BOOL", 1),
}
"""Name -> type and length. All but the first are optional; their defaults are those of `runtime.Sampling`, and one
answer instead of a stream."""
OUTPUTS: Mapping[str, tuple[str, int]] = {
    "text_output": ("STRING", 1),
    "token_ids": ("INT32", ANY_LENGTH),
    "finish_reason": ("STRING", 1),
}
"""`finish_reason` is empty in every response but the last."""


def text_config(name: str, options: TritonOptions) -> Any:
    """The config of a text model, as `model_config_pb2.ModelConfig`.

    One instance takes all requests: it decides which of them gets the next token.

    Raises:
        UserError: tritonclient is not installed.
    """
    config = model_config_module().ModelConfig(name=name, backend="python", max_batch_size=0)
    config.model_transaction_policy.decoupled = True
    config.version_policy.latest.num_versions = options.keep_versions
    group = config.instance_group.add(count=1)
    group.kind = group.KIND_CPU
    for field, tensors in ((config.input, INPUTS), (config.output, OUTPUTS)):
        for tensor, (kind, length) in tensors.items():
            field.add(name=tensor, data_type=data_type(kind), dims=[length])
    for item in config.input[1:]:
        item.optional = True
    values = {"max_active": options.max_active, "max_queue": options.max_queue, "threads": options.threads}
    for key, value in values.items():
        if value is not None:
            config.parameters[key].string_value = str(value)
    if options.variant != "cpu":
        # Without it every tensor of the cache would travel to the host and back at each token.
        config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "no"
    return config


def parameter_of(config: Mapping[str, Any], key: str) -> int | None:
    """A number among the parameters of a config, as the Python backend gives it; None where it is not set."""
    value = config.get("parameters", {}).get(key)
    return None if value is None else int(value["string_value"])
