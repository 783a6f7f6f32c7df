"""`quantization_config` of a compressed-tensors checkpoint: the part of the format that W4A8 and W4A16 need.

Unknown entries are refused: what a later version of the format adds may change what the tensors mean.
Format: https://github.com/vllm-project/compressed-tensors (Apache-2.0), versions 0.x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from fptq_export.errors import Problem
from fptq_export.files import json_path_from_location

__all__ = ["FORMATS", "CompressedTensorsConfig", "QuantizationArgs", "Scheme", "config_problems", "schemes_by_path"]

FORMATS: Final = ("pack-quantized", "int-quantized")
_REGEX = "re:"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QuantizationArgs(_Model):
    """How one tensor of a layer is quantized."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool | str = False
    actorder: str | bool | None = None
    block_structure: Any = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: dict[str, Any] = {}


class Scheme(_Model):
    """One group of layers that are quantized alike."""

    targets: tuple[str, ...]
    """Torch paths, `re:` and a regular expression, or class names."""
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    output_activations: QuantizationArgs | None = None
    format: str | None = None


class CompressedTensorsConfig(_Model):
    """`quantization_config`."""

    quant_method: Literal["compressed-tensors"] = "compressed-tensors"
    config_groups: dict[str, Scheme]
    format: str
    quantization_status: str = "compressed"
    ignore: tuple[str, ...] | None = ()
    kv_cache_scheme: dict[str, Any] | None = None
    global_compression_ratio: float | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    moe_sparsity_config: dict[str, Any] | None = None
    version: str | None = None
    """Version of the library that wrote it."""

    def format_of(self, scheme: Scheme) -> str:
        """How the tensors of a group are stored."""
        return scheme.format or self.format


def config_problems(config: CompressedTensorsConfig) -> Iterator[Problem]:
    """Everything in a config that the INT4 x INT8 kernels cannot run as it stands."""
    if config.version is not None and not config.version.startswith("0."):
        yield _problem("version", f"{config.version!r} is unknown; 0.x is supported")
    if config.quantization_status != "compressed":
        yield _problem("quantization_status", f"is {config.quantization_status!r}; only 'compressed' holds INT4 codes")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        if getattr(config, name):
            yield _problem(name, "is not supported: what it describes would be lost")
    for name, scheme in config.config_groups.items():
        where = ("config_groups", name)
        if config.format_of(scheme) not in FORMATS:
            cause = f"{config.format_of(scheme)!r} is not supported; choose one of {', '.join(FORMATS)}"
            yield _problem((*where, "format"), cause)
        if scheme.output_activations is not None:
            yield _problem((*where, "output_activations"), "quantized outputs are not supported")
        if scheme.weights is None:
            yield _problem((*where, "weights"), "missing: only groups with INT4 weights are supported")
        else:
            yield from _weight_problems(scheme.weights, (*where, "weights"))
        if scheme.input_activations is not None:
            yield from _activation_problems(scheme.input_activations, (*where, "input_activations"))
        yield from _target_problems(scheme.targets, (*where, "targets"))
    yield from _target_problems(config.ignore or (), ("ignore",))


def _weight_problems(args: QuantizationArgs, where: tuple[str, ...]) -> Iterator[Problem]:
    if (args.num_bits, args.type) != (4, "int"):
        yield _problem((*where, "num_bits"), f"the weights are {args.type}{args.num_bits}; only int4 is supported")
    if not args.symmetric:
        yield _problem((*where, "symmetric"), "the weights are asymmetric; the INT4 kernels have no zero points")
    if args.dynamic:
        yield _problem((*where, "dynamic"), "weights that are quantized at run time have no codes")
    if args.actorder in ("group", "dynamic", True):
        cause = "groups in activation order are not contiguous channels; only 'weight' (static groups) is supported"
        yield _problem((*where, "actorder"), cause)
    strategy = args.strategy or ("group" if (args.group_size or 0) > 0 else "channel" if args.group_size else "tensor")
    if strategy not in ("group", "channel"):
        yield _problem((*where, "strategy"), f"{strategy!r} is not supported; use 'group' or 'channel'")
    elif strategy == "group" and (args.group_size or 0) <= 0:
        yield _problem((*where, "group_size"), f"is {args.group_size}; 'group' needs a positive one")


def _activation_problems(args: QuantizationArgs, where: tuple[str, ...]) -> Iterator[Problem]:
    if (args.num_bits, args.type) != (8, "int"):
        yield _problem((*where, "num_bits"), f"the inputs are {args.type}{args.num_bits}; only int8 is supported")
    if not args.symmetric:
        yield _problem((*where, "symmetric"), "the inputs are asymmetric; INT8 here has no zero point")
    strategy = args.strategy or "tensor"
    if (strategy, args.dynamic) not in (("token", True), ("tensor", False)):
        kind = "dynamic" if args.dynamic else "static"
        cause = f"{kind} per {strategy} is not supported; use dynamic per token or static per tensor"
        yield _problem((*where, "strategy"), cause)


def _target_problems(targets: tuple[str, ...], where: tuple[str, ...]) -> Iterator[Problem]:
    for target in targets:
        try:
            re.compile(target.removeprefix(_REGEX) if target.startswith(_REGEX) else "")
        except re.error as error:
            yield _problem(where, f"{target!r} is not a regular expression ({error})")


def _problem(where: str | tuple[str, ...], message: str) -> Problem:
    location = (where,) if isinstance(where, str) else where
    return Problem(json_path_from_location(("quantization_config", *location)), message)


def schemes_by_path(config: CompressedTensorsConfig, linears: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """Linear path -> its scheme. A full path wins over a regular expression, and that over a class name.

    Args:
        config: Checked by `config_problems`.
        linears: Every linear of the model.
    """
    targets = [(target, scheme) for scheme in config.config_groups.values() for target in scheme.targets]
    named = sorted(targets, key=lambda item: (item[0].startswith(_REGEX), item[0]))
    found: dict[str, Scheme] = {}
    for path, linear in linears.items():
        ignored = any(_names(target, path) or _is_class(target, linear) for target in config.ignore or ())
        if ignored:
            continue
        by_name = (scheme for target, scheme in named if _names(target, path))
        by_class = (scheme for target, scheme in named if _is_class(target, linear))
        scheme = next(by_name, None) or next(by_class, None)
        if scheme is not None:
            found[path] = scheme
    return found


def _names(target: str, path: str) -> bool:
    if target.startswith(_REGEX):
        return re.match(target.removeprefix(_REGEX), path) is not None
    return target == path


def _is_class(target: str, linear: nn.Module) -> bool:
    return any(issubclass(cls, nn.Module) and cls.__name__ == target for cls in type(linear).__mro__)
