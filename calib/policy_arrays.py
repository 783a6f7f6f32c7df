"""The arrays of a policy: equalization scales, integer codes and their scales, one linear in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.equalize import LinearScales, equalized_weight, scales_from_sites
from calib.hessians import Hessians
from calib.linears import LinearWeights
from calib.load import Checkpoint
from calib.site_scales import SiteScales, scales_of_policy
from calib.weights import WEIGHT_METHODS, WeightProblem
from calib.weights.per_channel import quantize_int8
from fptq_export.errors import UserError
from fptq_export.packing import packed_from_int4
from fptq_export.policy import ArrayStream, LayerPolicy, Policy
from fptq_export.progress import Progress
from fptq_export.sites import Sites
from fptq_export.tensor_writer import TensorSpec

__all__ = ["policy_arrays"]

Maxima = Mapping[str, NDArray[np.float32]]


def policy_arrays(
    policy: Policy,
    sites: Sites,
    maxima: Maxima,
    checkpoint: Checkpoint,
    progress: Progress,
    hessians: Path | None = None,
    site_scales: SiteScales | None = None,
) -> ArrayStream:
    """Everything that `policy.safetensors` holds, one weight at a time.

    Args:
        policy: Complete: tiers, group sizes and weight methods of every quantized layer.
        sites: Fold sites.
        maxima: Linear path -> channel maxima, float32 [in].
        checkpoint: Read weight by weight.
        progress: Reports layers.
        hessians: `hessians.safetensors`, where a weight method needs it.
        site_scales: Those of the policy, where they are known already.

    Returns:
        The arrays that `fptq_export.policy` lists.

    Raises:
        UserError: A weight disagrees with the traced graph, or the Hessians that a weight method needs are not there.
            While the arrays are computed: a group scale does not fit float16.
    """
    weights = LinearWeights.from_checkpoint(checkpoint)
    if site_scales is None:
        site_scales = scales_of_policy(policy, sites, maxima, weights.read, {})
    scales = scales_from_sites(sites, policy.equalized_sites(), site_scales.equalization)
    small: dict[str, NDArray[Any]] = {f"{site}.equalization": s for site, s in site_scales.equalization.items()}
    small.update({f"{site}.input_rms": rms for site, rms in site_scales.rms.items()})
    small.update({f"{path}.input_absmax": maxima[path] for path in policy.layers if path in maxima})
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in small.items()}
    for path, layer in policy.quantized().items():
        _check_shape(path, layer, weights)
        specs.update(_weight_specs(path, layer))
    read_hessian = _hessian_reader(sites, policy, hessians)

    def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
        yield from small.items()
        quantized = policy.quantized()
        with progress.task("quantize weights", len(quantized), unit="layers") as task:
            for path, layer in quantized.items():
                if layer.weight_method == "given":
                    yield from _given_arrays(path, checkpoint)
                    task.advance()
                    continue
                touched = scales.get(path, LinearScales())
                weight = equalized_weight(weights.read(path), touched)
                codes, weight_scales = (
                    _int8_arrays(path, weight)
                    if layer.precision == "w8a8"
                    else _int4_arrays(path, layer, weight, read_hessian(path, touched))
                )
                yield f"{path}.weight_codes", codes
                yield f"{path}.weight_scales", weight_scales
                task.advance()

    return ArrayStream(specs, arrays())


def _weight_specs(path: str, layer: LayerPolicy) -> dict[str, TensorSpec]:
    if layer.precision == "w8a8":
        return {
            f"{path}.weight_codes": TensorSpec.of("int8", layer.out_features, layer.in_features),
            f"{path}.weight_scales": TensorSpec.of("float32", layer.out_features),
        }
    if layer.group_size is None:
        raise RuntimeError(f"{path} is to be quantized, but its policy has no group size")
    return {
        f"{path}.weight_codes": TensorSpec.of("uint8", layer.out_features, layer.in_features // 2),
        f"{path}.weight_scales": TensorSpec.of("float16", layer.out_features, layer.in_features // layer.group_size),
    }


def _hessian_reader(
    sites: Sites, policy: Policy, file: Path | None
) -> Callable[[str, LinearScales], torch.Tensor | None]:
    """Give a function that reads H of a linear's equalized input, or None for methods that do without."""
    layers = policy.quantized()
    needing = {path for path, layer in layers.items() if _needs_hessian(layer)}
    if not needing:
        return lambda _path, _scales: None
    if file is None:
        raise UserError(f"layer {min(needing)}", "its weight method needs Hessians of the inputs", Hessians.HINT)
    stored = Hessians(file, sites)

    def read(path: str, scales: LinearScales) -> torch.Tensor | None:
        if path not in needing:
            return None
        hessian = stored.read(path)
        if scales.input is not None:
            s = torch.from_numpy(scales.input)
            hessian.div_(s[:, None]).div_(s)
        return hessian

    return read


def _needs_hessian(layer: LayerPolicy) -> bool:
    method = WEIGHT_METHODS.get(layer.weight_method) if layer.weight_method is not None else None
    return method is not None and method.needs_hessian


def _given_arrays(path: str, checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[Any]]]:
    if checkpoint.given is None:
        raise UserError(f"layer {path}", "the model holds no INT4 codes to take over", "choose a weight method")
    codes, scales = checkpoint.given.read(path)
    yield f"{path}.weight_codes", codes
    yield f"{path}.weight_scales", scales


def _check_shape(path: str, layer: LayerPolicy, weights: LinearWeights) -> None:
    expected, shape = (layer.out_features, layer.in_features), weights.shapes.get(path)
    if shape != expected:
        cause = f"its weight is {shape and list(shape)}, but the traced graph has {list(expected)}"
        raise UserError(f"layer {path}", cause, "trace the model again")


def _int8_arrays(path: str, weight: torch.Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    codes, scales = quantize_int8(weight)
    if not torch.isfinite(scales).all():
        cause = "its equalized weight is not finite in float32"
        raise UserError(f"layer {path}", cause, f"leave it in float: --precision '{path}=float'")
    return codes.numpy(), scales.numpy()


def _int4_arrays(
    path: str, layer: LayerPolicy, weight: torch.Tensor, hessian: torch.Tensor | None
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    if layer.weight_method is None or layer.group_size is None:
        raise RuntimeError(f"{path} is to be quantized, but its policy has no weight method or no group size")
    problem = WeightProblem(weight, layer.group_size, hessian, signed_scales=layer.signed_scales)
    try:
        quantized = WEIGHT_METHODS[layer.weight_method].quantize(problem)
    except ValueError as error:
        hint = "calibrate on more text, or use another --weight-method"
        raise UserError(f"layer {path}", f"{layer.weight_method} failed: {error}", hint) from error
    if not torch.isfinite(quantized.scales).all():
        raise UserError(
            f"layer {path}",
            f"its equalized weight reaches {weight.abs().max().item():.4g}: the group scale does not fit float16",
            f"exclude the layer: --exclude '{path}'",
        )
    return packed_from_int4(quantized.codes.numpy()), quantized.scales.numpy()
