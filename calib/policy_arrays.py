"""The arrays of a policy: equalization scales, integer codes and their scales, one linear in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.convolutions import convolution_arrays, convolution_specs
from calib.equalize import LinearScales, equalized_weight, scales_from_sites
from calib.graph_weights import GraphWeights
from calib.hessians import Hessians
from calib.layer_arrays import needs_hessian, quantized_arrays, weight_specs
from calib.linears import LinearWeights, weights_from_source
from calib.load import Checkpoint
from calib.sequential import Sequential, sequential_arrays
from calib.site_scales import SiteScales, scales_of_policy
from fptq_export.errors import UserError
from fptq_export.policy import ArrayStream, LayerPolicy, Policy, PolicyArrays
from fptq_export.progress import Progress
from fptq_export.sites import Sites
from fptq_export.tensor_writer import TensorSpec

__all__ = ["policy_arrays"]

Maxima = Mapping[str, NDArray[np.float32]]


def policy_arrays(
    policy: Policy,
    sites: Sites,
    maxima: Maxima,
    checkpoint: Checkpoint | GraphWeights,
    progress: Progress,
    hessians: Path | None = None,
    site_scales: SiteScales | None = None,
    *,
    sequential: Sequential | None = None,
    stored: PolicyArrays | None = None,
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
        sequential: Quantize block by block with the inputs that quantized blocks give, and not from `hessians`.
        stored: Arrays of the policy as it was: layers with a `sequential` entry keep their codes and scales.

    Returns:
        The arrays that `fptq_export.policy` lists.

    Raises:
        UserError: A weight disagrees with the traced graph, or the Hessians that a weight method needs are not there.
            While the arrays are computed: a group scale does not fit float16.
    """
    weights = weights_from_source(checkpoint)
    if site_scales is None:
        site_scales = scales_of_policy(policy, sites, maxima, weights.read, {})
    scales = scales_from_sites(sites, policy.equalized_sites(), site_scales.equalization)
    small: dict[str, NDArray[Any]] = {f"{site}.equalization": s for site, s in site_scales.equalization.items()}
    small.update({f"{site}.input_rms": rms for site, rms in site_scales.rms.items()})
    measured = (path for path in (*policy.layers, *policy.convolutions) if path in maxima)
    small.update({f"{path}.input_absmax": maxima[path] for path in measured})
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in small.items()}
    for path, layer in policy.quantized().items():
        _check_shape(path, layer, weights)
        specs.update(weight_specs(path, layer))
    specs.update(convolution_specs(policy, sites))
    quantizer = _Quantizer(policy, weights, scales)
    if sequential is not None:
        codes = sequential_arrays(policy, sites, small, sequential, quantizer.arrays, progress)
    else:
        codes = _one_by_one(quantizer, _hessian_reader(sites, policy, hessians, stored), checkpoint, stored, progress)

    def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
        yield from small.items()
        yield from codes
        if isinstance(checkpoint, GraphWeights):
            yield from convolution_arrays(policy, sites, checkpoint.read_convolution)

    return ArrayStream(specs, arrays())


@dataclass(frozen=True)
class _Quantizer:
    """Quantizes the linears of a policy."""

    policy: Policy
    weights: LinearWeights | GraphWeights
    scales: Mapping[str, LinearScales]

    def arrays(self, path: str, hessian: torch.Tensor | None) -> dict[str, NDArray[Any]]:
        """Codes and scales of one linear.

        Args:
            path: Of the linear.
            hessian: Mean x x^T of its input before equalization, float32 [in, in]; it is not used again. None for
                methods that do without.
        """
        touched = self.scales.get(path, LinearScales())
        if hessian is not None and touched.input is not None:
            s = torch.from_numpy(touched.input)
            hessian.div_(s[:, None]).div_(s)
        weight = equalized_weight(self.weights.read(path), touched)
        return quantized_arrays(path, self.policy.layers[path], weight, hessian)


def _one_by_one(
    quantizer: _Quantizer,
    read_hessian: Callable[[str], torch.Tensor | None],
    checkpoint: Checkpoint | GraphWeights,
    stored: PolicyArrays | None,
    progress: Progress,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Codes and scales of every layer, each from the statistics of the float model, or as they are known already."""
    quantized = quantizer.policy.quantized()
    with progress.task("quantize weights", len(quantized), unit="layers") as task:
        for path, layer in quantized.items():
            if layer.weight_method == "given":
                yield from _given_arrays(path, checkpoint)
            elif _keeps_codes(layer, stored) and stored is not None:
                specs = weight_specs(path, layer)
                yield from ((name, stored.read(name, spec.shape)) for name, spec in specs.items())
            else:
                yield from quantizer.arrays(path, read_hessian(path)).items()
            task.advance()


def _keeps_codes(layer: LayerPolicy, stored: PolicyArrays | None) -> bool:
    return stored is not None and layer.sequential is not None


def _hessian_reader(
    sites: Sites, policy: Policy, file: Path | None, stored: PolicyArrays | None
) -> Callable[[str], torch.Tensor | None]:
    """Give a function that reads H of a linear's input, or None for methods that do without."""
    layers = policy.quantized()
    needing = {path for path, layer in layers.items() if needs_hessian(layer) and not _keeps_codes(layer, stored)}
    if not needing:
        return lambda _path: None
    if file is None:
        raise UserError(f"layer {min(needing)}", "its weight method needs Hessians of the inputs", Hessians.HINT)
    matrices = Hessians(file, sites)
    return lambda path: matrices.read(path) if path in needing else None


def _given_arrays(path: str, checkpoint: Checkpoint | GraphWeights) -> Iterator[tuple[str, NDArray[Any]]]:
    if checkpoint.given is None:
        raise UserError(f"layer {path}", "the model holds no INT4 codes to take over", "choose a weight method")
    codes, scales = checkpoint.given.read(path)
    yield f"{path}.weight_codes", codes
    yield f"{path}.weight_scales", scales


def _check_shape(path: str, layer: LayerPolicy, weights: LinearWeights | GraphWeights) -> None:
    expected, shape = (layer.out_features, layer.in_features), weights.shapes.get(path)
    if shape != expected:
        cause = f"its weight is {shape and list(shape)}, but the traced graph has {list(expected)}"
        raise UserError(f"layer {path}", cause, "trace the model again")
