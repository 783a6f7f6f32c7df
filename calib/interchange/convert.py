"""Turn a quantized checkpoint into a float one beside its INT4 codes, once: as a GGUF file is dequantized.

The float model is what is traced, calibrated and compared with; the codes go into the policy as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from calib.given import GIVEN_ARRAYS, GIVEN_INDEX, Given, GivenLayer
from calib.interchange.awq import awq_sources
from calib.interchange.compressed_tensors import compressed_tensors_sources
from calib.interchange.gptq import gptq_sources
from calib.interchange.source import FLOAT_DTYPES, LinearSource, kernel_groups, storable_scales
from calib.linears import linears_from_model, weight_from_linear
from calib.load import Checkpoint, checkpoint_from_directory, read_tensor, skeleton_from_checkpoint
from calib.tensor_files import WEIGHTS_FILE
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.files import PARTIAL_SUFFIX, read_json_model, sha256_from_file, write_json_model, write_text
from fptq_export.packing import packed_from_int4
from fptq_export.policy import GROUP_SIZES
from fptq_export.progress import Progress
from fptq_export.tensor_writer import TensorSpec, TensorWriter, tensor_writer

__all__ = ["FORMATS", "directory_from_quantized", "quantization_from_directory"]

_Sources = Callable[[Checkpoint, Mapping[str, Any], Mapping[str, nn.Module]], dict[str, LinearSource]]
FORMATS: Mapping[str, _Sources] = {
    "compressed-tensors": compressed_tensors_sources,
    "gptq": gptq_sources,
    "awq": awq_sources,
}
"""By the `quant_method` of `quantization_config`."""

_COPIED_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"})
_LEFT_OUT = frozenset({"config.json", "model.safetensors.index.json", GIVEN_INDEX})


def quantization_from_directory(directory: Path) -> Mapping[str, Any] | None:
    """`quantization_config` of a checkpoint's `config.json`; None where there is none, or no readable config."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else None


def directory_from_quantized(
    source: Path, directory: Path, *, trust_remote_code: bool, progress: Progress
) -> tuple[Path, Given]:
    """Dequantize a checkpoint into `directory`, or reuse what an earlier run made from the same files.

    The directory is built under a temporary name beside its own and renamed, so it is never half-written.

    Args:
        source: Hugging Face directory with a `quantization_config`.
        directory: Where the float model goes: 4 bytes a weight, and half a byte for its code.
        trust_remote_code: Run Python code that comes with the model.
        progress: Reports layers.

    Returns:
        `directory`, and what is given there.

    Raises:
        UserError: The format is unknown, or a layer cannot be represented; says which and why.
        UserErrors: The config or the tensors are wrong, all of it at once.
    """
    checkpoint = checkpoint_from_directory(
        source, source.resolve().name, trust_remote_code=trust_remote_code, quantized=True
    )
    method, sources, linears = _sources(checkpoint)
    hashes = _hashes(checkpoint)
    marker = directory / GIVEN_INDEX
    if marker.is_file():
        known = read_json_model(marker, Given)
        if known.sources == hashes:
            return directory, known
    partial_directory = directory.with_name(f".{directory.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(partial_directory, ignore_errors=True)
    partial_directory.mkdir(parents=True)
    try:
        _copy_small_files(source, partial_directory)
        _write_config(source, partial_directory)
        layers = _write_weights(checkpoint, sources, linears, partial_directory, progress)
        given = Given(format=method, sources=hashes, layers=layers)
        write_json_model(given, partial_directory / GIVEN_INDEX)
        if directory.exists():
            shutil.rmtree(directory)
        partial_directory.rename(directory)
    finally:
        shutil.rmtree(partial_directory, ignore_errors=True)
    return directory, given


def _sources(checkpoint: Checkpoint) -> tuple[str, dict[str, LinearSource], Mapping[str, nn.Module]]:
    raw = quantization_from_directory(checkpoint.directory) or {}
    method = str(raw.get("quant_method", "missing"))
    file = checkpoint.directory / "config.json"
    if method not in FORMATS:
        cause = f"the weights are already quantized, and quant_method {method!r} cannot be read"
        raise UserError(str(file), cause, f"give {', '.join(FORMATS)}, or the original FP16, BF16 or FP32 model")
    linears = linears_from_model(skeleton_from_checkpoint(checkpoint))
    sources = FORMATS[method](checkpoint, raw, linears)
    if not sources:
        raise UserError(str(file), f"no linear of the model is quantized as {method}", "give the original float model")
    problems = [*_group_problems(sources), *_stray_problems(checkpoint, sources)]
    if problems:
        raise UserErrors(str(checkpoint.directory), problems, "give the original float model")
    return method, sources, linears


def _group_problems(sources: Mapping[str, LinearSource]) -> list[Problem]:
    supported = ", ".join(map(str, GROUP_SIZES))
    return [
        Problem(f'$["{path}"]', f"groups of {source.group_size} do not divide into groups of {supported}")
        for path, source in sources.items()
        if kernel_groups(source.group_size) is None
    ]


def _stray_problems(checkpoint: Checkpoint, sources: Mapping[str, LinearSource]) -> list[Problem]:
    claimed = {name for source in sources.values() for name in source.tensors}
    return [
        Problem(f'$["{name}"]', f"is {entry.dtype}, but belongs to no quantized linear of the model")
        for name, entry in checkpoint.tensors.items()
        if name not in claimed and entry.dtype not in (*FLOAT_DTYPES, "F64")
    ]


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    files = {entry.file for entry in checkpoint.tensors.values()} | {checkpoint.directory / "config.json"}
    return {str(file.relative_to(checkpoint.directory)): sha256_from_file(file) for file in sorted(files)}


def _copy_small_files(source: Path, directory: Path) -> None:
    for file in source.iterdir():
        if file.suffix in _COPIED_SUFFIXES and file.name not in _LEFT_OUT and file.is_file():
            shutil.copyfile(file, directory / file.name)


def _write_config(source: Path, directory: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for name in ("quantization_config", "torch_dtype"):
        config.pop(name, None)
    config["dtype"] = "float32"
    write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", directory / "config.json")


def _write_weights(
    checkpoint: Checkpoint,
    sources: Mapping[str, LinearSource],
    linears: Mapping[str, nn.Module],
    directory: Path,
    progress: Progress,
) -> dict[str, GivenLayer]:
    """Write codes, scales and the float model side by side, reading every tensor once; returns what is given."""
    arrays: dict[str, TensorSpec] = {}
    floats: dict[str, TensorSpec] = {}
    for path, source in sources.items():
        out_features, in_features = weight_from_linear(linears[path]).shape
        arrays[f"{path}.weight_codes"] = TensorSpec.of("uint8", out_features, in_features // 2)
        arrays[f"{path}.weight_scales"] = TensorSpec.of("float16", out_features, in_features // _group_size(source))
        floats[f"{path}.weight"] = TensorSpec.of("float32", *linears[path].get_parameter("weight").shape)
    claimed = {name for source in sources.values() for name in source.tensors}
    others = {name: entry.shape for name, entry in checkpoint.tensors.items() if name not in claimed}
    floats.update({name: TensorSpec.of("float32", *shape) for name, shape in others.items()})
    layers: dict[str, GivenLayer] = {}
    with (
        progress.task("read INT4 codes", len(sources), unit="layers") as task,
        tensor_writer(directory / GIVEN_ARRAYS, arrays) as given,
        tensor_writer(directory / WEIGHTS_FILE, floats, {"format": "pt"}) as model,
    ):
        for path, source in sources.items():
            layers[path] = _write_layer(source, linears[path], given, model)
            task.advance()
        for name in others:
            model.write(name, read_tensor(checkpoint, name).to(torch.float32).numpy())
    return layers


def _write_layer(source: LinearSource, linear: nn.Module, given: TensorWriter, model: TensorWriter) -> GivenLayer:
    """Write one linear into both files. The float weight is codes times float16 scales, exact in float32."""
    weight = source.read()
    scales, rounded = storable_scales(source.path, weight)
    group_size = _group_size(source)
    kernel_scales = scales.repeat_interleave(source.group_size // group_size, dim=1)
    given.write(f"{source.path}.weight_codes", packed_from_int4(weight.codes.numpy()))
    given.write(f"{source.path}.weight_scales", kernel_scales.numpy())
    groups = weight.codes.to(torch.float32).reshape(*scales.shape, -1)
    groups *= scales.to(torch.float32)[..., None]
    values = groups.reshape(weight.codes.shape)
    model.write(f"{source.path}.weight", (values.T if isinstance(linear, Conv1D) else values).numpy())
    notes = ["group scales rounded to float16"] if rounded else []
    if group_size != source.group_size:
        notes.append(f"groups of {source.group_size} stored as groups of {group_size} with the same scale")
    return GivenLayer(
        group_size=group_size,
        signed_scales=bool((scales < 0).any()),
        activation=source.activation,
        activation_scale=source.read_activation_scale() if source.read_activation_scale is not None else None,
        note="; ".join(notes),
    )


def _group_size(source: LinearSource) -> int:
    """The group size of the kernels."""
    return kernel_groups(source.group_size) or source.group_size
