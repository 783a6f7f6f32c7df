"""Read a compressed-tensors checkpoint (llm-compressor, vLLM): symmetric INT4 weights in contiguous groups.

`pack-quantized` stores code + 8 as nibbles of int32 along `in`, the first in the lowest bits; `int-quantized` stores
each code as an int8 under the name of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from calib.given import GivenActivation
from calib.interchange.compressed_tensors_config import (
    CompressedTensorsConfig,
    Scheme,
    config_problems,
    schemes_by_path,
)
from calib.interchange.source import (
    FLOAT_DTYPES,
    Expected,
    LinearSource,
    StoredWeight,
    check_contiguous_groups,
    check_zero_points,
    nibbles_from_int32,
    tensor_problems,
)
from calib.linears import weight_from_linear
from calib.load import Checkpoint, read_tensor
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.files import json_path_from_location
from fptq_export.packing import INT4_MIN

__all__ = ["compressed_tensors_sources"]

_PACK_FACTOR = 8
_WEIGHT_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
_INPUT_PARTS = ("input_scale", "input_zero_point")
_HINT = "quantize with the W4A8 or W4A16 preset, or give the original float model"


def compressed_tensors_sources(
    checkpoint: Checkpoint, raw: Mapping[str, Any], linears: Mapping[str, nn.Module]
) -> dict[str, LinearSource]:
    """Find every quantized linear.

    Args:
        checkpoint: Tensor headers by torch path.
        raw: `quantization_config`.
        linears: The linears of the model that the config describes, on the meta device.

    Raises:
        UserErrors: The config asks for what cannot be run, or tensors are missing or wrong; all of them at once.
    """
    file = str(checkpoint.directory / "config.json")
    config = _config(raw, file)
    problems = list(config_problems(config))
    if problems:
        raise UserErrors(file, problems, _HINT)
    sources = {
        path: _source(checkpoint, path, linears[path], scheme, config.format_of(scheme))
        for path, scheme in schemes_by_path(config, linears).items()
    }
    problems = [problem for source, found in sources.values() for problem in found]
    if problems:
        raise UserErrors(str(checkpoint.directory), problems, "the checkpoint is damaged: fetch it again")
    return {path: source for path, (source, _) in sources.items()}


def _config(raw: Mapping[str, Any], file: str) -> CompressedTensorsConfig:
    try:
        return CompressedTensorsConfig.model_validate(raw)
    except ValidationError as error:
        problems = [
            Problem(json_path_from_location(("quantization_config", *item["loc"])), item["msg"])
            for item in error.errors()
        ]
        raise UserErrors(file, problems, _HINT) from None


def _source(
    checkpoint: Checkpoint, path: str, linear: nn.Module, scheme: Scheme, layout: str
) -> tuple[LinearSource, list[Problem]]:
    out_features, in_features = weight_from_linear(linear).shape
    stored = scheme.weights.group_size if scheme.weights is not None else None
    group_size = stored if stored is not None and stored > 0 else in_features
    static = scheme.input_activations is not None and not scheme.input_activations.dynamic
    activation: GivenActivation | None = "static" if static else "per_token"
    problems = list(
        tensor_problems(checkpoint, _expected(path, (out_features, in_features), group_size, layout, static=static))
    )
    if in_features % group_size:
        cause = f"its {in_features} inputs are not a multiple of group size {group_size}"
        problems.append(Problem(f'$["{path}"]', cause))
    names = (f"{path}.{part}" for part in (*_WEIGHT_PARTS, *_INPUT_PARTS))
    source = LinearSource(
        path=path,
        group_size=group_size,
        tensors=frozenset(name for name in names if name in checkpoint.tensors),
        read=partial(_read, checkpoint, path, (out_features, in_features), group_size, layout),
        activation=None if scheme.input_activations is None else activation,
        read_activation_scale=partial(_read_input_scale, checkpoint, path) if static else None,
    )
    return source, problems


def _expected(
    path: str, shape: tuple[int, int], group_size: int, layout: str, *, static: bool
) -> Mapping[str, Expected]:
    out_features, in_features = shape
    expected = {f"{path}.weight_scale": Expected(FLOAT_DTYPES, (out_features, in_features // group_size))}
    if layout == "pack-quantized":
        words = math.ceil(in_features / _PACK_FACTOR)
        expected[f"{path}.weight_packed"] = Expected(("I32",), (out_features, words))
        expected[f"{path}.weight_shape"] = Expected(("I64", "I32"), (2,))
    else:
        expected[f"{path}.weight"] = Expected(("I8",), shape)
    if static:
        expected[f"{path}.input_scale"] = Expected(FLOAT_DTYPES, (1,))
    return expected


def _read(checkpoint: Checkpoint, path: str, shape: tuple[int, int], group_size: int, layout: str) -> StoredWeight:
    def part(name: str) -> torch.Tensor | None:
        full = f"{path}.{name}"
        return read_tensor(checkpoint, full) if full in checkpoint.tensors else None

    check_contiguous_groups(path, part("weight_g_idx"), group_size)
    for name in ("weight_zero_point", "input_zero_point"):
        zero_points = part(name)
        if zero_points is not None:
            check_zero_points(path, zero_points, 0)
    scales = read_tensor(checkpoint, f"{path}.weight_scale")
    if layout == "int-quantized":
        return StoredWeight(read_tensor(checkpoint, f"{path}.weight"), scales)
    stored_shape = read_tensor(checkpoint, f"{path}.weight_shape").tolist()
    if stored_shape != list(shape):
        cause = f"weight_shape says {stored_shape}, but config.json describes {list(shape)}"
        raise UserError(f"layer {path}", cause, "the checkpoint is damaged: fetch it again")
    nibbles = nibbles_from_int32(read_tensor(checkpoint, f"{path}.weight_packed"))[:, : shape[1]]
    return StoredWeight(nibbles.to(torch.int8) + INT4_MIN, scales)


def _read_input_scale(checkpoint: Checkpoint, path: str) -> float:
    scale = float(read_tensor(checkpoint, f"{path}.input_scale"))
    if not torch.finfo(torch.float32).tiny <= scale < math.inf:
        raise UserError(f"layer {path}", f"its input_scale is {scale:g}", "the checkpoint was not calibrated")
    return scale
