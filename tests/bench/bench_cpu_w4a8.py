"""W4A8 on the CPU against ONNX Runtime's MatMulNBits with INT8 compute (accuracy_level 4): one thread, as ratios.

    python -m tests.bench.bench_cpu_w4a8

A bench, not a test: no assertion, nothing timed in CI. Both sides take FP32 activations, quantize them (we per token,
MatMulNBits per token and block) and give FP32; weights have N = K = 4096. The two are timed in turns in one process, so
that other work on the machine slows both, and the best time of each counts. Targets are ratios, MatMulNBits / ours:
1.8 at M >= 32 and 1.1 at M = 1.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from fptq_export import cpu
from fptq_export.cpu import InstructionSet, PackedWeight, packed_weight_from_codes

N = K = 4096
TARGETS = {1: 1.1, 32: 1.8, 128: 1.8, 512: 1.8}
"""Least ratio at M; other M have none."""


@dataclass(frozen=True)
class Timing:
    """Best seconds of one call at M rows."""

    tokens: int
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs / self.ours

    def gops(self, seconds: float) -> float:
        """Multiply-adds count as two."""
        return 2e-9 * self.tokens * N * K / seconds


def matmul_nbits_session(codes: NDArray[np.int8], scale: NDArray[np.float16], group_size: int) -> Any:
    """A session of one MatMulNBits node with the same weights: uint4 with zero point 8, FP32 scales."""
    nibbles = (codes + 8).astype(np.uint8).reshape(N, K // group_size, group_size // 2, 2)
    attributes: dict[str, Any] = {"K": K, "N": N, "bits": 4, "block_size": group_size, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", N])],
        [
            numpy_helper.from_array(nibbles[..., 0] | nibbles[..., 1] << 4, "codes"),
            numpy_helper.from_array(scale.astype(np.float32), "scale"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def best_seconds(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Best time of each call; they take turns until `seconds` have passed."""
    best = [float("inf")] * len(calls)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best


def time_tokens(
    tokens: int, weight: PackedWeight, session: Any, instruction_set: InstructionSet, seconds: float
) -> Timing:
    """Time both at M = `tokens`, after checking that they compute the same linear."""
    x = np.random.default_rng(tokens).standard_normal((tokens, K)).astype(np.float32)

    def ours() -> NDArray[np.floating]:
        return cpu.w4a8_linear(x, weight, instruction_set=instruction_set, threads=1)

    def theirs() -> NDArray[np.floating]:
        result: NDArray[np.floating] = session.run(None, {"x": x})[0]
        return result

    # Activations of another granularity differ by their rounding, some 1 % of a result; another weight by 100 %.
    difference = np.linalg.norm(ours() - theirs()) / np.linalg.norm(theirs())
    if difference > 0.05:
        raise AssertionError(f"the two compute different linears: relative difference {difference:.3f}")
    return Timing(tokens, *best_seconds([ours, theirs], seconds))


def main() -> None:
    """Print one table for each group size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 32, 128, 512])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row of the table")
    names = [item.value for item in InstructionSet]
    parser.add_argument("--instruction-set", choices=names, default=cpu.available_instruction_sets()[0].value)
    options = parser.parse_args()
    console = Console()
    console.print(f"{platform.processor() or platform.machine()}, ONNX Runtime {onnxruntime.__version__}, one thread")
    for group_size in options.group_sizes:
        rng = np.random.default_rng(0)
        codes = rng.integers(-8, 8, (N, K), dtype=np.int8)
        scale = rng.uniform(0.001, 0.01, (N, K // group_size)).astype(np.float16)
        weight = packed_weight_from_codes(codes, scale, group_size)
        session = matmul_nbits_session(codes, scale, group_size)
        table = Table("M", "ours ms", "GOPS", "MatMulNBits ms", "GOPS", "ratio", "target")
        table.title = f"N = K = {N}, group {group_size}, {options.instruction_set}"
        for tokens in options.tokens:
            result = time_tokens(tokens, weight, session, InstructionSet(options.instruction_set), options.seconds)
            ours, theirs = result.ours, result.theirs
            numbers = [ours * 1e3, result.gops(ours), theirs * 1e3, result.gops(theirs), result.ratio]
            table.add_row(str(tokens), *(f"{value:.3g}" for value in numbers), str(TARGETS.get(tokens, "")) or "-")
        console.print(table)


if __name__ == "__main__":
    main()
