"""W4A8 on the GPU against cuBLAS FP16, cuBLASLt INT8 and TensorRT's INT4 weight-only linear, as ratios.

    python -m tests.bench.bench_gpu_w4a8 [--tokens 1 16 4096] [--json FILE]

A bench, not a test. A call of ours quantizes its FP16 activation (per token) and multiplies; cuBLASLt INT8 is given an
activation that is quantized already and leaves INT32, so it has less to do. Every call is timed by CUDA events after
the L2 cache was overwritten; the time is the median of many. Our time is that of the configuration that
`fptqChooseConfig` names, `best` that of the fastest candidate, which is what TensorRT's timing finds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fptq_export.build.targets import Target, module_name
from fptq_export.build.tensorrt import tensorrt_for_target
from fptq_export.errors import ExitCode, UserError
from fptq_export.files import write_text
from tests.bench.int4_engine import int4_linear, plan_from_model
from tests.gpu.boundary import open_boundary
from tests.gpu.conftest import built_boundary
from tests.gpu.driver import CudaMemory, Driver, cuda_device
from tests.gpu.engine_run import EngineRun
from tests.plugins.emulation.harness import PER_TOKEN, Desc
from tests.plugins.emulation.weights import GROUP, plain_weight

__all__ = ["Timing", "main", "table_from_timings"]

SHAPES = {
    "7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "13B": ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),
    "70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
"""(N, K) of LLaMA's q/k/v, output, gate/up and down projections."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
GROUP_SIZE = 128
INT8_LEAST_ROWS = 17
"""torch._int_mm takes no fewer."""
BASELINES = ("cublas_fp16", "cublaslt_int8", "tensorrt_int4")


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one call; None for what does not run at this size or is not installed."""

    model: str
    m: int
    n: int
    k: int
    ours: float
    best: float
    cublas_fp16: float
    cublaslt_int8: float | None
    tensorrt_int4: float | None

    def ratio(self, baseline: str) -> float | None:
        """How many times faster ours is than a baseline."""
        other: float | None = getattr(self, baseline)
        return None if other is None else other / self.ours

    @property
    def weight_gigabytes_per_second(self) -> float:
        """Codes and scales read once: the bound at small M."""
        return self.n * self.k * (0.5 + 2 / GROUP_SIZE) / self.ours * 1e-3

    @property
    def tops(self) -> float:
        """Multiply-adds count as two: the bound at large M."""
        return 2e-6 * self.m * self.n * self.k / self.ours


def table_from_timings(timings: Sequence[Timing]) -> Table:
    """One line a problem: times, what they mean, and the ratios."""
    columns = ["model", "M", "N", "K", "ours us", "best us", "GB/s", "TOPS"]
    table = Table(*columns, *(f"vs {baseline}" for baseline in BASELINES))
    for timing in timings:
        numbers = [timing.ours, timing.best, timing.weight_gigabytes_per_second, timing.tops]
        ratios = [timing.ratio(baseline) for baseline in BASELINES]
        cells = [f"{value:.4g}" for value in numbers] + ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        table.add_row(timing.model, str(timing.m), str(timing.n), str(timing.k), *cells)
    return table


class Stopwatch:
    """Median time of a call on the GPU, each one with a cold L2 cache."""

    def __init__(self, repetitions: int) -> None:
        found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._flush = torch.empty(4 * found.L2_cache_size, dtype=torch.int8, device="cuda")
        self._repetitions = repetitions

    def microseconds(self, call: Callable[[], object]) -> float:
        """Median over the repetitions, after three that are not counted."""
        for _ in range(3):
            call()
        events = []
        for _ in range(self._repetitions):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return 1e3 * float(statistics.median(start.elapsed_time(end) for start, end in events))


def time_problem(
    driver: Driver, stopwatch: Stopwatch, target: Target | None, model: str, shape: tuple[int, int, int]
) -> Timing:
    """Time all at one size, after checking that ours computes what FP16 computes."""
    m, n, k = shape
    rng = np.random.default_rng(shape)
    codes = rng.integers(-8, 8, (n, k), dtype=np.int8)
    scales = rng.uniform(0.001, 0.01, (n, k // GROUP_SIZE)).astype(np.float16)
    x = rng.standard_normal((m, k)).astype(np.float16)
    weight = plain_weight(codes, scales, GROUP_SIZE)
    candidates = driver.boundary.candidates(Desc(m, n, k, GROUP_SIZE, GROUP, PER_TOKEN, 0, 0), cuda_device())
    x_gpu = torch.from_numpy(x).cuda()
    dense = torch.from_numpy(codes).cuda().half() * torch.from_numpy(scales).cuda().repeat_interleave(GROUP_SIZE, dim=1)
    times = []
    for config in candidates:
        prepared = driver.prepare(x, weight, config)
        driver.boundary.check(prepared.launch())
        times.append(stopwatch.microseconds(prepared.launch))
        if len(times) == 1:
            check_same_linear(torch.from_numpy(prepared.output().astype(np.float32)), (x_gpu @ dense.T).float().cpu())
    return Timing(
        model,
        m,
        n,
        k,
        ours=times[0],
        best=min(times),
        cublas_fp16=stopwatch.microseconds(lambda: torch.matmul(x_gpu, dense.T)),
        cublaslt_int8=time_int8(stopwatch, x_gpu, torch.from_numpy(codes).cuda()),
        tensorrt_int4=None if target is None else time_int4(stopwatch, target, codes, scales, x),
    )


def check_same_linear(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Activations rounded to INT8 differ by some 1 % of a result; another weight by 100 %."""
    difference = float((ours - theirs).norm() / theirs.norm())
    if not difference <= 0.05:
        raise AssertionError(f"the two compute different linears: relative difference {difference:.3f}")


def time_int8(stopwatch: Stopwatch, x: torch.Tensor, codes: torch.Tensor) -> float | None:
    """INT8 x INT8 -> INT32 of the same size; None below the rows it takes."""
    if x.shape[0] < INT8_LEAST_ROWS:
        return None
    quantized, weight = (16 * x).clamp(-128, 127).to(torch.int8), codes.T
    return stopwatch.microseconds(lambda: torch._int_mm(quantized, weight))


def time_int4(stopwatch: Stopwatch, target: Target, codes: Any, scales: Any, x: Any) -> float:
    """TensorRT's engine of one INT4 weight-only linear."""
    model = int4_linear(np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), GROUP_SIZE)
    engine = EngineRun(target, plan_from_model(tensorrt_for_target(target), model, x.shape[0]))
    engine.prepare({"x": x})
    return stopwatch.microseconds(engine.enqueue)


def installed_target() -> Target | None:
    """TensorRT where it is installed, else TensorRT for RTX, else none."""
    for target in (Target.TENSORRT, Target.TENSORRT_RTX):
        name = module_name(target)
        if name is not None and importlib.util.find_spec(name) is not None:
            return target
    return None


def run(options: argparse.Namespace, console: Console) -> None:
    """Time every problem, print the table, write the file."""
    if not torch.cuda.is_available():
        hint = "run it on a machine with a GPU, nvcc and a torch with CUDA"
        raise UserError("bench_gpu_w4a8", "torch sees no NVIDIA GPU here", hint)
    target = installed_target()
    machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    console.print(f"{machine}, {target or 'no TensorRT'}; group {GROUP_SIZE}, per token, FP16, L2 flushed, median")
    timings = []
    with tempfile.TemporaryDirectory() as directory:
        driver = Driver(open_boundary(built_boundary(Path(directory))), CudaMemory())
        stopwatch = Stopwatch(options.repetitions)
        for model in options.models:
            for m in options.tokens:
                timings += [time_problem(driver, stopwatch, target, model, (m, n, k)) for n, k in SHAPES[model]]
    console.print(table_from_timings(timings))
    if options.json is not None:
        ratios = [{**asdict(t), "ratios": {name: t.ratio(name) for name in BASELINES}} for t in timings]
        write_text(json.dumps({"machine": machine, "timings": ratios}, indent=2) + "\n", options.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["7B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--repetitions", type=int, default=50, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    try:
        run(parser.parse_args(arguments), Console())
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", soft_wrap=True, markup=False)
        return int(error.exit_code)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
