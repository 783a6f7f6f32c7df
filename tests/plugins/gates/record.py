"""`python -m tests.plugins.gates.record`: write the counts of the time model, from the machine code as it is now."""

from __future__ import annotations

import json
from typing import Any

from fptq_export.files import write_text
from fptq_export.plugin.build import ARCHITECTURES
from fptq_export.roofline.instructions import COUNTS_FILE
from tests.plugins.gates.checks import others_per_imma
from tests.plugins.gates.compile import code_of, nvcc_version
from tests.plugins.gates.kernels import gemm_from_name, gemv_from_name
from tests.plugins.gates.sass import main_loop, mnemonic_counts

__all__ = ["counts_of"]


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


def main() -> None:
    """Write the file."""
    document: dict[str, Any] = {
        "nvcc": nvcc_version(),
        "architectures": {each: counts_of(each) for each in ARCHITECTURES},
    }
    write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", COUNTS_FILE)


if __name__ == "__main__":
    main()
