"""Which plugin library a run builds its engine with."""

from __future__ import annotations

import platform
from pathlib import Path

from fptq_export.build.targets import Target
from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.plugin import library_for_loading
from fptq_export.policy import Policy

__all__ = ["check_signed_scales", "plugin_libraries"]


def plugin_libraries(options: RunOptions, target: Target) -> tuple[Path, ...]:
    """The library of `--plugin on`; none with `--plugin off`.

    Raises:
        UserError: The plugin cannot run this graph or on this target, or it is not built.
    """
    if options.plugin == "off":
        return ()
    where = "--plugin on"
    if options.dtype == "fp32":
        raise UserError(where, "the kernels compute in FP16 or BF16", "choose another --dtype, or --plugin off")
    if target is Target.ONNX:
        raise UserError(where, "there is no engine with --target onnx", "leave one of the two out")
    if platform.system() != "Linux":
        raise UserError(where, "the plugin is built on Linux only", "use --plugin off, which needs no library of ours")
    return (library_for_loading(),)


def check_signed_scales(policy: Policy, options: RunOptions) -> None:
    """Refuse negative group scales where no plugin runs them: TensorRT's own INT4 layers take positive scales.

    Raises:
        UserError: Names the first such layer.
    """
    signed = [path for path, layer in policy.quantized().items() if layer.signed_scales]
    if signed and options.plugin == "off":
        raise UserError(
            f"layer {signed[0]}", "signed group scales need the plugin", "add --plugin on, or leave them out"
        )
