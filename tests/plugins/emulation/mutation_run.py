"""`python -m tests.plugins.emulation.mutation_run`: run every mutation and record the sources they were caught in.

Whether a mutation is caught depends on the kernels and on the cases, not on the machine: while neither changes, the
tests run a few of them only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from fptq_export.files import write_text
from tests.plugins.emulation.cases import SMALL_SCHEMES, SMALL_TILES
from tests.plugins.emulation.harness import HERE, ROOT, SOURCES, build
from tests.plugins.emulation.mutations import MUTATIONS, Mutation

__all__ = ["DEFINES", "RECORD", "current_key", "detect", "missed_of", "mutant", "mutations_to_run"]

KIND_NAMES = ("FPTQ_PER_CHANNEL", "FPTQ_GROUP", "FPTQ_TWO_LEVEL")
DEFINES = (
    "-DFPTQ_GEMM_TILES(T)=" + " ".join(f"T({', '.join(map(str, tile))})" for tile in SMALL_TILES),
    "-DFPTQ_SCHEMES(S)=" + " ".join(f"S({KIND_NAMES[kind]}, {group})" for kind, group in SMALL_SCHEMES),
)
USERS = {  # the files to compile again when a file changes
    "w4a8_gemm.cuh": ("w4a8_gemm.cu",),
    "gemm_shapes.cuh": ("w4a8_gemm.cu",),
    "scale_pairs.cuh": ("w4a8_gemm.cu",),
    "split_k_reduce.cuh": ("w4a8_gemm.cu",),
    "w4a8_gemv.cuh": ("w4a8_gemv.cu",),
    "scheme.cuh": ("w4a8_gemm.cu", "w4a8_gemv.cu"),
    "quantize_row.cuh": ("quantize_activation.cu", "w4a8_gemv.cu"),
    "bounds.h": ("quantize_activation.cu", "w4a8_gemv.cu"),
}
DETECT_SECONDS = 120  # a mutation that makes the kernels run on is caught, too
WORKERS = 2


def detect(library: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.plugins.emulation.detect", str(library)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DETECT_SECONDS, check=False)


def mutant(directory: Path, mutations: Sequence[Mutation], base: Path) -> Path:
    """A library whose sources have the given edits."""
    sources = directory / "src"
    shutil.copytree(ROOT / "plugins/src", sources)
    changed: set[str] = set()
    for mutation in mutations:
        path = sources / mutation.file
        text = path.read_text(encoding="utf-8")
        assert mutation.old in text, f"{mutation.name}: {mutation.file} no longer contains {mutation.old!r}"
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        changed.update(USERS[mutation.file])
    names = [name for name in (*SOURCES, "cuda_emulation.cpp") if name not in changed]
    return build(directory, sources, {name: base / f"{name}.o" for name in names}, DEFINES)


RECORD = HERE / "mutations.json"
_EVERY = 8
"""Of the mutations, one in so many is run where all were caught in the very same sources."""
_EVERYTHING = "FPTQ_ALL_MUTATIONS"
"""Environment variable: run all of them, whatever the record says."""


def current_key(source_dir: Path = ROOT / "plugins/src") -> str:
    """Names the kernels, the emulator, the cases and their reference."""
    files = [*source_dir.iterdir(), *(ROOT / "plugins/include").rglob("*"), *HERE.iterdir()]
    files += [ROOT / "fptq_export" / name for name in ("numerics.py", "packing.py")]
    known = sorted(
        (path.name, path.read_bytes())
        for path in files
        if path.is_file() and path.name not in (RECORD.name, "conftest.py")
    )
    return hashlib.sha256(b"\0".join(part for name, text in known for part in (name.encode(), text))).hexdigest()


def mutations_to_run(key: str, recorded: str, *, everything: bool | None = None) -> tuple[Mutation, ...]:
    """All mutations, or some of them where all were caught for the very same key."""
    if everything is None:
        everything = os.environ.get(_EVERYTHING, "") not in ("", "0")
    return tuple(MUTATIONS[::_EVERY] if key == recorded and not everything else MUTATIONS)


def missed_of(mutations: Sequence[Mutation], base: Path, directory: Path) -> list[str]:
    """Names of the mutations that no case fails on; one that does not compile raises."""

    def verdict(numbered: tuple[int, Mutation]) -> str | None:
        number, mutation = numbered
        place = directory / str(number)
        try:
            status = detect(mutant(place, [mutation], base)).returncode
        except subprocess.TimeoutExpired:
            status = 1
        shutil.rmtree(place)
        return mutation.name if status == 0 else None

    with ThreadPoolExecutor(WORKERS) as pool:
        return [name for name in pool.map(verdict, enumerate(mutations)) if name is not None]


def main() -> int:
    """Write the record, unless a mutation is missed."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        base.mkdir()
        build(base, defines=DEFINES)
        missed = missed_of(MUTATIONS, base, Path(name))
    if missed:
        Console(stderr=True).print("missed:", *missed, sep="\n", markup=False)
        return 1
    document = {"key": current_key(), "caught": [mutation.name for mutation in MUTATIONS]}
    write_text(json.dumps(document, indent=1) + "\n", RECORD)
    return 0


if __name__ == "__main__":
    sys.exit(main())
