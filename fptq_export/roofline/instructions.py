"""How many instructions the kernels spend: counted in their machine code by tests/plugins/gates, never estimated."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COUNTS_FILE", "Scheme", "Tile", "gemm_others", "gemv_per_tile", "tiles"]

COUNTS_FILE = Path(__file__).with_name("instructions.json")
"""Written by `python -m tests.plugins.gates.record`; a gate compares it with the machine code of the day."""


@dataclass(frozen=True)
class Scheme:
    """How weights are scaled: `per_channel` (group size 0), `group` or `two_level`."""

    name: str
    group_size: int = 0

    @property
    def key(self) -> str:
        """As `group 128`."""
        return f"{self.name} {self.group_size}"


@dataclass(frozen=True)
class Tile:
    """Tile of a thread block and of a warp, in rows and output channels."""

    block_m: int
    block_n: int
    warp_m: int
    warp_n: int


@functools.cache
def _counts() -> Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]:
    counts: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(COUNTS_FILE.read_text(encoding="utf-8"))[
        "architectures"
    ]
    return counts


def tiles(architecture: str, scheme: Scheme) -> tuple[Tile, ...]:
    """Tiles that the GEMM is compiled for with a scheme."""
    texts = [text for text, schemes in _counts()[architecture]["gemm"].items() if scheme.key in schemes]
    return tuple(Tile(*map(int, text.split("x"))) for text in texts)


def gemm_others(architecture: str, tile: Tile, scheme: Scheme) -> float:
    """Instructions that are neither IMMA nor NOP, for each IMMA of the main loop."""
    key = f"{tile.block_m}x{tile.block_n}x{tile.warp_m}x{tile.warp_n}"
    return _counts()[architecture]["gemm"][key][scheme.key]


def gemv_per_tile(architecture: str, rows: int, scheme: Scheme) -> float:
    """Instructions of a warp of the GEMV for a packed tile of 16 x 64 weights."""
    return _counts()[architecture]["gemv"][str(rows)][scheme.key]
