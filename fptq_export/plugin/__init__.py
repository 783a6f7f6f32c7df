"""The TensorRT plugin from Python: building its libraries, finding them, and asking what is in them.

python -m fptq_export.plugin build [--arch 80 89] [--tensorrt-include DIR]
python -m fptq_export.plugin info
python -m fptq_export.plugin headers
"""

from fptq_export.plugin.library import (
    PluginInfo,
    library_for_loading,
    library_that_registers,
    plugin_info,
)

__all__ = ["PluginInfo", "library_for_loading", "library_that_registers", "plugin_info"]
