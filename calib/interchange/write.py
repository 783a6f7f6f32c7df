"""Write a policy as a compressed-tensors checkpoint: the same codes and scales, for llm-compressor and vLLM.

The codes are those of the equalized weight, so everything that equalization touches is written equalized: norms are
divided by s, rows and biases of producing linears too, and linears that stay float have their columns multiplied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from calib.equalize import LinearScales, equalized_weight, scales_from_sites
from calib.linears import linears_from_model
from calib.load import Checkpoint, read_tensor, skeleton_from_checkpoint
from calib.tensor_files import WEIGHTS_FILE
from fptq_export.errors import UserError
from fptq_export.files import write_text
from fptq_export.packing import int4_from_packed
from fptq_export.policy import LayerPolicy, Policy, PolicyArrays
from fptq_export.sites import Producer, Sites
from fptq_export.tensor_writer import TensorSpec, tensor_writer

__all__ = ["WriteOptions", "write_checkpoint"]

_DTYPES: Final = {"fp16": "float16", "fp32": "float32"}
_PACK_FACTOR = 8
_SIGN_BITS = 0x88
"""Of the two codes in a byte: flipping them adds 8."""


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is written."""

    layout: Literal["int-quantized", "pack-quantized"] = "int-quantized"
    """`int-quantized` is what llm-compressor writes and vLLM's W4A8 kernels read: one byte a code. `pack-quantized` is
    half of that; vLLM runs it with float activations."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Of everything that is not quantized. Group scales are float16, which bfloat16 would round."""
    per_token: bool = False
    """Quantize every input token by token, whatever the policy says: vLLM has no static W4A8."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write."""

    spec: TensorSpec
    read: Callable[[], NDArray[Any]]
    """Gives it when its turn comes, so that one is in memory at a time."""


def write_checkpoint(
    checkpoint: Checkpoint,
    sites: Sites,
    policy: Policy,
    arrays: PolicyArrays,
    directory: Path,
    options: WriteOptions,
) -> dict[str, Any]:
    """Write `config.json` and `model.safetensors`.

    Args:
        checkpoint: The float model that the policy was made for.
        sites: Its fold sites.
        policy: Complete.
        arrays: Its arrays.
        directory: Where the files go.
        options: Layout and types.

    Returns:
        How many layers have static and dynamic inputs, for the summary.

    Raises:
        UserError: The format cannot hold the policy (tied or Conv1D weights, negative scales), the checkpoint lacks a
            tensor, or a folded value overflows.
    """
    quantized = policy.quantized()
    _check_layers(checkpoint, quantized)
    equalization = {
        site: arrays.read(f"{site}.equalization", (sites.site(site).channels,)) for site in policy.equalized_sites()
    }
    changes = _changed_tensors(checkpoint, sites, policy, equalization)
    dtype = _DTYPES[options.dtype]
    tensors: dict[str, _Tensor] = {}
    for path, layer in quantized.items():
        tensors.update(_layer_tensors(path, layer, arrays, options))
    for name, entry in checkpoint.tensors.items():
        if name.removesuffix(".weight") not in quantized:
            read = changes.get(name, partial(_float_tensor, checkpoint, name))
            spec = TensorSpec(np.dtype(dtype), entry.shape)
            tensors[name] = _Tensor(spec, partial(_rounded, name, read, dtype))
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    with tensor_writer(directory / WEIGHTS_FILE, specs, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.read())
    write_text(json.dumps(_config(checkpoint, policy, options), indent=2) + "\n", directory / "config.json")
    static = sum(_is_static(layer, options) for layer in quantized.values())
    return {"format": options.layout, "static": static, "per_token": len(quantized) - static}


def _check_layers(checkpoint: Checkpoint, quantized: Mapping[str, LayerPolicy]) -> None:
    skeleton = skeleton_from_checkpoint(checkpoint)
    linears = linears_from_model(skeleton)
    tied = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    for path, layer in quantized.items():
        where, name = f"layer {path}", f"{path}.weight"
        if layer.precision != "w4a8":
            cause = f"is {layer.precision}, and checkpoints are written with w4a8 and float layers only"
            raise UserError(where, cause, f"leave it in float: --precision '{path}=float'")
        if not isinstance(linears.get(path), torch.nn.Linear):
            raise UserError(where, "compressed-tensors quantizes torch.nn.Linear only", "exclude the layer")
        if name in tied or name in tied.values():
            raise UserError(where, "its weight is tied to another module, which stays float", "exclude the layer")
        if name not in checkpoint.tensors:
            raise UserError(where, "the checkpoint stores its weight under another name", "exclude the layer")
        if checkpoint.unstacked and checkpoint.tensors[name].key != name:
            cause = "the checkpoint stores the weights of experts under other names, which its readers look for"
            raise UserError(where, cause, "leave the experts in float: --precision 'experts=float'")
        if layer.signed_scales:
            cause = "its group scales are signed, which other tools do not expect"
            raise UserError(where, cause, "run again with --no-signed-scales")


def _changed_tensors(
    checkpoint: Checkpoint, sites: Sites, policy: Policy, equalization: Mapping[str, NDArray[np.float32]]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Tensors that equalization changes -> their new values in float32. Weights of quantized layers are codes."""
    changes: dict[str, Callable[[], torch.Tensor]] = {}
    for site_id, scale in equalization.items():
        site = sites.site(site_id)
        for producer in site.producers if site.producer_linear is None else ():
            if producer.initializer not in checkpoint.tensors:
                cause = f"the checkpoint has no tensor {producer.initializer!r} to fold the equalization into"
                raise UserError(f"fold site {site_id}", cause, "set the layers that read it to per_token")
            changes[producer.initializer] = partial(_divided, checkpoint, producer, scale)
    for path, touched in scales_from_sites(sites, equalization, equalization).items():
        weight, bias = f"{path}.weight", f"{path}.bias"
        if path not in policy.quantized():
            if weight not in checkpoint.tensors:
                cause = "it reads an equalized tensor, and its weight is tied to another module"
                raise UserError(f"layer {path}", cause, "set the layers that read the same tensor to per_token")
            changes[weight] = partial(_equalized, checkpoint, weight, touched)
        if touched.output is not None and bias in checkpoint.tensors:
            changes[bias] = partial(_divided, checkpoint, Producer(initializer=bias, axis=0), touched.output)
    return changes


def _divided(checkpoint: Checkpoint, producer: Producer, scale: NDArray[np.float32]) -> torch.Tensor:
    values = _float_tensor(checkpoint, producer.initializer)
    return (values + producer.offset) / torch.from_numpy(scale) - producer.offset


def _equalized(checkpoint: Checkpoint, name: str, touched: LinearScales) -> torch.Tensor:
    return equalized_weight(_float_tensor(checkpoint, name), touched)


def _float_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return read_tensor(checkpoint, name).to(torch.float32)


def _rounded(name: str, read: Callable[[], torch.Tensor], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        values = read().numpy().astype(dtype)
    if not np.isfinite(values).all():
        raise UserError(f"tensor {name!r}", "does not fit float16", "run with --dtype fp32")
    return values


def _layer_tensors(path: str, layer: LayerPolicy, arrays: PolicyArrays, options: WriteOptions) -> dict[str, _Tensor]:
    rows, columns = shape = layer.out_features, layer.in_features
    groups = rows, columns // (layer.group_size or columns)

    def packed() -> NDArray[np.uint8]:
        return arrays.read(f"{path}.weight_codes", (rows, columns // 2))

    def scales() -> NDArray[np.float16]:
        return arrays.read(f"{path}.weight_scales", groups)

    tensors = {f"{path}.weight_scale": _Tensor(TensorSpec.of("float16", *groups), scales)}
    if options.layout == "int-quantized":
        tensors[f"{path}.weight"] = _Tensor(TensorSpec.of("int8", *shape), lambda: int4_from_packed(packed()))
    else:
        # Eight nibbles code + 8 an int32, the first in the lowest bits.
        words = TensorSpec.of("int32", rows, columns // _PACK_FACTOR)
        tensors[f"{path}.weight_packed"] = _Tensor(words, lambda: (packed() ^ _SIGN_BITS).view(np.int32))
        tensors[f"{path}.weight_shape"] = _Tensor(TensorSpec.of("int64", 2), lambda: np.array(shape, np.int64))
    if _is_static(layer, options):
        input_scale = np.array([layer.activation_scale], np.float32)
        tensors[f"{path}.input_scale"] = _Tensor(TensorSpec.of("float32", 1), lambda: input_scale)
    return tensors


def _is_static(layer: LayerPolicy, options: WriteOptions) -> bool:
    return layer.activation != "per_token" and not options.per_token


def _config(checkpoint: Checkpoint, policy: Policy, options: WriteOptions) -> dict[str, Any]:
    config = json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = _DTYPES[options.dtype]
    members: dict[tuple[int | None, bool], list[str]] = {}
    for path, layer in policy.quantized().items():
        members.setdefault((layer.group_size, _is_static(layer, options)), []).append(path)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": options.layout,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": _scheme(paths, group_size, options.layout, static=static)
            for index, ((group_size, static), paths) in enumerate(members.items())
        },
        "ignore": [path for path, layer in policy.layers.items() if layer.precision == "float"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return dict(config)


def _scheme(paths: list[str], group_size: int | None, layout: str, *, static: bool) -> dict[str, Any]:
    integers = {"type": "int", "symmetric": True}
    inputs = {"strategy": "tensor", "dynamic": False} if static else {"strategy": "token", "dynamic": True}
    return {
        "targets": paths,
        "weights": {"num_bits": 4, **integers, "strategy": "group", "group_size": group_size, "dynamic": False},
        "input_activations": {"num_bits": 8, **integers, **inputs},
        "output_activations": None,
        "format": layout,
    }
