"""What an engine needs of the machine that loads it: kept in the manifest and in the proof, and read by `doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from fptq_export.build.profiles import Profile

__all__ = ["EngineFacts", "InputRange", "PluginFacts", "facts_from_summary", "ranges_from_profiles"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PluginFacts(_Model):
    """The plugin library an engine was built with."""

    version: str
    """Version of fptq-export."""
    layout_version: int
    """Layout of the packed weights in the engine."""
    architectures: tuple[int, ...]
    """Compute capabilities (86 is 8.6) with machine code; the newest also has PTX for later ones."""
    tensorrt_headers: str
    sha256: str
    embedded: bool = False
    """Whether the engine carries the library, byte by byte."""


class InputRange(_Model):
    """Shapes of one input in one optimization profile."""

    name: str
    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


class EngineFacts(_Model):
    """What an engine was built for."""

    target: str
    """`tensorrt` or `tensorrt-rtx`."""
    library_version: str
    """Of that library: by default only the same version loads the engine."""
    compute_capabilities: tuple[str, ...]
    """`8.9`, `12.0`, ...: the GPUs it was built for; empty where the library chose."""
    profiles: tuple[tuple[InputRange, ...], ...] | None = None
    """None where an earlier version of this tool did not record them."""
    plugin_layers: int = 0
    """Layers that cannot run, nor be loaded, without the plugin."""
    plugin: PluginFacts | None = None
    """None where no layer needs it, or where an earlier version of this tool did not record it."""

    @property
    def carries_plugin(self) -> bool:
        """Whether the plugin is in the engine. TensorRT then runs code from the engine's file when it loads it."""
        return self.plugin is not None and self.plugin.embedded

    @property
    def needs_library(self) -> bool:
        """Whether the plugin library must be loaded before the engine."""
        return self.plugin_layers > 0 and not self.carries_plugin


def ranges_from_profiles(profiles: tuple[Profile, ...]) -> tuple[tuple[InputRange, ...], ...]:
    """The same as a build was asked for."""
    return tuple(
        tuple(
            InputRange(name=item.name, minimum=item.minimum, optimum=item.optimum, maximum=item.maximum)
            for item in profile.ranges
        )
        for profile in profiles
    )


def facts_from_summary(summary: Mapping[str, Any]) -> EngineFacts:
    """The facts in a manifest's figures of a build; manifests of before there were facts have some of them.

    Raises:
        pydantic.ValidationError: What is there is not what this tool writes.
    """
    if "engine" in summary:
        return EngineFacts.model_validate(summary["engine"])
    return EngineFacts.model_validate(
        {
            "target": summary.get("target"),
            "library_version": summary.get("library_version"),
            "compute_capabilities": summary.get("compute_capabilities", ()),
            "plugin_layers": summary.get("plugin_layers", 0),
        }
    )
