"""`--memPoolSize`: limits for the builder's memory pools, in trtexec's words."""

from __future__ import annotations

import re

from fptq_export.errors import Problem, UserErrors

__all__ = ["MEMORY_POOLS", "mem_pools_from_option"]

MEMORY_POOLS = {
    "workspace": "WORKSPACE",
    "dlaSRAM": "DLA_MANAGED_SRAM",
    "dlaLocalDRAM": "DLA_LOCAL_DRAM",
    "dlaGlobalDRAM": "DLA_GLOBAL_DRAM",
    "tacticDRAM": "TACTIC_DRAM",
    "tacticSharedMem": "TACTIC_SHARED_MEMORY",
}
"""trtexec's pool name -> member of `MemoryPoolType`."""

_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "": 1 << 20}
"""Bytes in a unit; a bare number is MiB, as for trtexec."""

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<unit>[KMG])(I?B)?|(?P<bytes>B))?", re.IGNORECASE)
_SPELLINGS = {name.lower(): name for name in MEMORY_POOLS} | {"tacticsharedmemory": "tacticSharedMem"}


def mem_pools_from_option(text: str) -> dict[str, int]:
    """`workspace:8G,tacticSharedMem:48K` -> bytes by pool; no text, no limits.

    Sizes may have a fraction; K, M and G are powers of 1024; a bare number is MiB.

    Raises:
        UserErrors: Every pool that is unknown or named twice, and every size that is not a positive number.
    """
    pools: dict[str, int] = {}
    problems = []
    for entry in text.split(",") if text.strip() else ():
        spelling, _, size = entry.partition(":")
        name = _SPELLINGS.get(spelling.strip().lower().replace("_", ""))
        limit = _bytes_from_text(size.strip())
        if name is None:
            problems.append(Problem(entry, f"{spelling.strip()!r} is not a memory pool ({', '.join(MEMORY_POOLS)})"))
        elif limit is None:
            problems.append(Problem(entry, f"{size.strip()!r} is not a size such as 8G, 512M, 48K or 512 (MiB)"))
        elif name in pools:
            problems.append(Problem(entry, f"{name} is given twice"))
        else:
            pools[name] = limit
    if problems:
        raise UserErrors("--memPoolSize", problems, "write for example --memPoolSize workspace:8G")
    return pools


def _bytes_from_text(size: str) -> int | None:
    match = _SIZE.fullmatch(size)
    if match is None:
        return None
    unit = (match["unit"] or match["bytes"] or "").upper()
    return int(float(match["number"]) * _UNITS[unit]) or None
