"""Export Hugging Face LLMs to TensorRT engines quantized with FPTQ (W4A8).

Importing this package needs no torch, no TensorRT and no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fptq_export.plugin.library import PluginInfo

__all__ = ["__version__", "plugin_info"]

__version__ = "0.1.0"


def plugin_info() -> PluginInfo:
    """What the plugin library that engines are built with was made from: version, layout, compute capabilities.

    Raises:
        UserError: It is not built.
    """
    from fptq_export.plugin.library import plugin_info as info_of_library

    return info_of_library()
