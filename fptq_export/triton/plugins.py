"""The plugin in a model repository: beside the engines that need it, the same for all of them, or in an engine."""

from __future__ import annotations

from pathlib import Path

from fptq_export.errors import UserError
from fptq_export.files import sha256_from_file
from fptq_export.plugin.library import REGISTERING_LIBRARY

__all__ = ["EMBEDDED_PLUGIN_FILE", "carries_plugins", "check_plugin", "plugins_of"]

EMBEDDED_PLUGIN_FILE = "embedded_plugin.json"
"""Beside an engine that carries its plugin: which build of it."""


def plugins_of(repository: Path) -> list[Path]:
    """Every copy of the library, relative to the repository."""
    return sorted(path.relative_to(repository) for path in repository.glob(f"*/*/{REGISTERING_LIBRARY}"))


def carries_plugins(repository: Path) -> bool:
    """Whether any engine brings its plugin: the server must then be told to run code from engines."""
    return any(repository.glob(f"*/*/{EMBEDDED_PLUGIN_FILE}"))


def check_plugin(repository: Path, plugin: Path | None) -> None:
    """Refuse a library beside another one: a server has one set of plugins for all its engines.

    Raises:
        UserError: An engine in the repository needs a library that was built otherwise.
    """
    if plugin is None:
        return
    for other in plugins_of(repository):
        if sha256_from_file(repository / other) != sha256_from_file(plugin):
            cause = "is another build of the plugin than the new engine needs, and a server loads one"
            raise UserError(str(repository / other), cause, "remove that version, or write into another --repository")
