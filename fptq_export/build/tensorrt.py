"""The only module that imports TensorRT or TensorRT for RTX; their Python interfaces are the same."""

from __future__ import annotations

import importlib
from typing import Any

from fptq_export.build.targets import Target, module_name
from fptq_export.errors import UserError

__all__ = ["tensorrt_for_target"]


def tensorrt_for_target(target: Target) -> Any:
    """Import and return the module that builds for a target: `tensorrt` or `tensorrt_rtx`.

    Raises:
        UserError: The module is installed but does not load, or the target has none.
    """
    name = module_name(target)
    if name is None:
        raise UserError(f"--target {target}", "has no engine builder", "nothing is built for this target")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        # OSError: a shared library that the module loads by hand is missing.
        raise UserError(name, f"cannot be imported ({error})", "reinstall it, or choose another --target") from error
