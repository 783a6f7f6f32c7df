"""`python -m tests.plugins.gates.record`: run all gates on all architectures, and write what the machine code counts.

The record carries a key of sources, flags, compiler and gates. Compilers are deterministic: while the key is the same,
so is the machine code of every architecture, and the tests compile a few of them only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fptq_export.files import write_text
from fptq_export.plugin.build import ARCHITECTURES
from fptq_export.roofline.instructions import COUNTS_FILE
from tests.plugins.gates import budgets, checks, gates, kernels, sass
from tests.plugins.gates.checks import others_per_imma
from tests.plugins.gates.compile import SOURCE_DIR, SOURCES, code_of, compile_all, nvcc_version, source_key
from tests.plugins.gates.gates import GATES
from tests.plugins.gates.kernels import gemm_from_name, gemv_from_name
from tests.plugins.gates.sass import main_loop, mnemonic_counts

__all__ = ["RECORDED", "WITNESSES", "architectures_to_check", "counts_of", "current_key"]

RECORDED = json.loads(COUNTS_FILE.read_text(encoding="utf-8"))
WITNESSES = ("80",)
"""Compiled in every run: the oldest, whose budgets all others share."""
_EVERYTHING = "FPTQ_ALL_ARCHITECTURES"
"""Environment variable: compile and check all architectures, whatever the record says."""


def current_key(source_dir: Path = SOURCE_DIR) -> str:
    """Names sources, flags, compiler and gates."""
    parts = [source_key(source, source_dir) for source in SOURCES]
    parts += [
        Path(module.__file__ or "").read_text(encoding="utf-8") for module in (budgets, checks, gates, kernels, sass)
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def architectures_to_check(key: str, recorded: str, *, everything: bool | None = None) -> tuple[str, ...]:
    """All architectures, or the witnesses where the others are recorded for the very same key."""
    if everything is None:
        everything = os.environ.get(_EVERYTHING, "") not in ("", "0")
    return WITNESSES if key == recorded and not everything else ARCHITECTURES


def counts_of(architecture: str) -> dict[str, dict[str, dict[str, float]]]:
    """`gemm`: tile -> scheme -> others for each IMMA. `gemv`: rows -> scheme -> instructions a packed tile."""
    found: dict[str, dict[str, dict[str, float]]] = {"gemm": {}, "gemv": {}}
    for name, function in code_of("w4a8_gemm.cu", architecture)[0].items():
        if gemm := gemm_from_name(name):
            tile = f"{gemm.block_m}x{gemm.block_n}x{gemm.warp_m}x{gemm.warp_n}"
            key = f"{gemm.scheme} {gemm.group_size}"
            found["gemm"].setdefault(tile, {})[key] = round(others_per_imma(function), 3)
    for name, function in code_of("w4a8_gemv.cu", architecture)[0].items():
        if gemv := gemv_from_name(name):
            counts = mnemonic_counts(main_loop(function, "IDP"))
            per_tile = (counts.total() - counts["NOP"]) / gemv.DEPTH
            found["gemv"].setdefault(str(gemv.rows), {})[f"{gemv.scheme} {gemv.group_size}"] = per_tile
    return found


def main() -> int:
    """Write the file, unless a gate finds a problem."""
    compile_all(ARCHITECTURES)
    architectures: dict[str, Any] = {}
    problems = []
    for each in ARCHITECTURES:  # one after the other: a listing is read once and then let go
        problems += [f"sm_{each}: {problem}" for gate in GATES for problem in gate(each)]
        architectures[each] = counts_of(each)
    if problems:
        Console(stderr=True).print(*problems, sep="\n", markup=False)
        return 1
    document = {"nvcc": nvcc_version(), "key": current_key(), "architectures": architectures}
    write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", COUNTS_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
