"""The kernels of plugins/src as a host library: built with g++, called through ctypes, fed with numpy."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.plugins.emulation.weights import PER_CHANNEL, Weight, padded

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
SOURCES = (
    "w4a8_gemm.cu",
    "w4a8_gemv.cu",
    "quantize_activation.cu",
    "w4a8_linear.cpp",
    "config.cpp",
    "modelled_time.cpp",
    "status.cpp",
)
COMPILE = (
    "g++",
    "-x",
    "c++",
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-march=native",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
)
QUIET = ("-Wno-unknown-pragmas",)  # #pragma unroll

OK, NULL_POINTER, BAD_SHAPE, BAD_GROUP_SIZE, BAD_ALIGNMENT, BAD_CONFIG, SMALL_WORKSPACE, UNSUPPORTED, CUDA_ERROR = (
    range(9)
)
STATIC, PER_TOKEN = range(2)
FLOAT16, BFLOAT16 = range(2)
GEMV, GEMM = range(2)
OUTPUT_TYPES: tuple[Any, ...] = (np.float16, ml_dtypes.bfloat16)
Shape = tuple[int, int, int, int, int]  # block_m, block_n, warp_m, warp_n, stages
TILES: tuple[Shape, ...] = (
    (16, 128, 16, 32, 6),
    (32, 128, 32, 32, 4),
    (64, 64, 32, 32, 4),
    (64, 128, 64, 32, 4),
    (128, 128, 64, 32, 4),
    (128, 128, 64, 64, 4),
)
FLOAT32_UNIT_ROUNDOFF = 2.0**-24


class Desc(ctypes.Structure):
    """FptqGemmDesc."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("m", "n", "k", "group_size", "scheme", "activation_mode", "output_type", "has_bias")
    ]


class Config(ctypes.Structure):
    """FptqGemmConfig."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("kernel", "block_m", "block_n", "block_k", "warp_m", "warp_n", "stages", "split_k")
    ]


class Device(ctypes.Structure):
    """FptqDevice."""

    _fields_ = [(name, ctypes.c_int32) for name in ("compute_capability", "multiprocessors", "shared_memory_bytes")]


class Args(ctypes.Structure):
    """FptqGemmArgs."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "weight_codes", "weight_scales", "channel_scales", "x_scale", "bias", "y")
        ),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    ]


A100 = Device(80, 108, 166912)


def build(
    directory: Path, sources: Path | None = None, reuse: dict[str, Path] | None = None, defines: Sequence[str] = ()
) -> Path:
    """Compile the emulated kernels into a shared library; objects in `reuse` (by source name) are taken as they are."""
    sources = sources or ROOT / "plugins/src"
    directory.mkdir(parents=True, exist_ok=True)
    flags = [
        *COMPILE,
        *QUIET,
        "-DFPTQ_EMULATION",
        *defines,
        f"-I{ROOT / 'plugins/include'}",
        f"-I{sources}",
        f"-I{HERE}",
    ]
    objects = []
    for path in (*(sources / name for name in SOURCES), HERE / "cuda_emulation.cpp"):
        existing = (reuse or {}).get(path.name)
        target = existing or directory / f"{path.name}.o"
        if existing is None:
            run([*flags, "-c", str(path), "-o", str(target)])
        objects.append(str(target))
    library = directory / "libfptq_emulation.so"
    run(["g++", "-shared", *objects, "-o", str(library)])
    return library


def run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:4000]}")


def cached_library(cache: Path) -> Path:
    """The library of the sources as they are now; built again only when one of them changes.

    Two test runs may build it at the same time: each in a folder of its own, and the first one stays.
    """
    plugins = ROOT / "plugins"
    files = [plugins / "src" / name for name in SOURCES]
    files += sorted([*plugins.glob("src/*.h"), *plugins.glob("src/*.cuh"), *plugins.glob("include/fptq/*.h")])
    files += [HERE / "cuda_emulation.h", HERE / "cuda_emulation.cpp"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    library = cache / f"emulation-{digest}" / "libfptq_emulation.so"
    if not library.exists():
        partial = library.parent.with_name(f"{library.parent.name}.{os.getpid()}")
        build(partial)
        try:
            partial.rename(library.parent)
        except OSError:
            shutil.rmtree(partial)
    return library


def aligned_copy(array: NDArray[Any], extra: int = 0) -> NDArray[Any]:
    """The same values at an address that is a multiple of 256, plus `extra` bytes."""
    storage = np.zeros(array.nbytes + 512, dtype=np.uint8)
    start = -storage.ctypes.data % 256 + extra
    view = storage[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@dataclass
class Result:
    """What one call left behind."""

    status: int
    y: NDArray[Any]
    error: str
    counters: dict[str, int]
    group_sums: NDArray[np.int64]
    workspace: NDArray[np.uint8]


COUNTERS = ("ldmatrix_conflicts", "load_conflicts", "multiplies", "matrix_loads", "async_copies", "barriers", "threads")


class Kernels:
    """The emulated library."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)
        self.c.emulation_error.restype = ctypes.c_char_p
        self.c.emulation_trace.restype = ctypes.POINTER(ctypes.c_int64)
        self.c.fptqWorkspaceBytes.restype = ctypes.c_size_t
        self.c.fptqStatusMessage.restype = ctypes.c_char_p

    def add_range(self, array: NDArray[Any] | None, name: str, *, writable: bool = False) -> None:
        """Let kernels read, and write, an array."""
        if array is not None and array.nbytes:
            self.c.emulation_add_range(
                ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(array.nbytes), int(writable), name.encode()
            )

    def options(self, *, load_conflicts: bool = False, reverse: bool = False, fail_launch: int = -1) -> None:
        """Count conflicts of plain loads; run threads last to first; refuse the launch of this number."""
        self.c.emulation_set_options(int(load_conflicts), int(reverse), ctypes.c_int64(fail_launch))

    def counters(self) -> dict[str, int]:
        """What the emulator counted since the reset."""
        values = (ctypes.c_int64 * len(COUNTERS))()
        self.c.emulation_counters(values)
        return dict(zip(COUNTERS, values, strict=True))

    def choose(self, desc: Desc, device: Device = A100) -> Config:
        """Call fptqChooseConfig."""
        config = Config()
        status = self.c.fptqChooseConfig(ctypes.byref(desc), ctypes.byref(device), ctypes.byref(config))
        assert status == OK, status
        return config

    def candidates(self, desc: Desc, device: Device = A100, capacity: int = 64) -> list[Config]:
        """Call fptqCandidates."""
        configs = (Config * capacity)()
        count = ctypes.c_int32()
        status = self.c.fptqCandidates(ctypes.byref(desc), ctypes.byref(device), configs, capacity, ctypes.byref(count))
        assert status == OK, status
        return list(configs[: count.value])

    def explain(self, desc: Desc, device: Device = A100) -> str:
        """Call fptqExplainConfigs."""
        size = self.c.fptqExplainConfigs(ctypes.byref(desc), ctypes.byref(device), None, 0)
        assert size > 0, size
        text = ctypes.create_string_buffer(size)
        assert self.c.fptqExplainConfigs(ctypes.byref(desc), ctypes.byref(device), text, size) == size
        return text.value.decode()

    def linear(
        self,
        x: NDArray[Any],
        weight: Weight,
        config: Config | None = None,
        *,
        static_scale: float | None = None,
        bias: NDArray[Any] | None = None,
        trace: bool = False,
        x_offset: int = 0,
        n: int | None = None,
        **options: Any,
    ) -> Result:
        """fptqW4A8Linear; x [m, k] is FP16 or BF16, which is also the output type."""
        m, k = x.shape
        n = weight.values.shape[0] if n is None else n
        output_type = OUTPUT_TYPES.index(x.dtype.type)
        mode = PER_TOKEN if static_scale is None else STATIC
        desc = Desc(m, n, k, weight.kernel_group, weight.scheme, mode, output_type, int(bias is not None))
        config = config or self.choose(desc)
        size = self.c.fptqWorkspaceBytes(ctypes.byref(desc), ctypes.byref(config))
        guard = 64  # elements; stores past the end are caught by the emulator, and by these
        y = aligned_copy(np.full(m * n + guard, np.nan, dtype=x.dtype))
        arrays: dict[str, NDArray[Any] | None] = {
            "x": aligned_copy(x, x_offset),
            "weight_codes": aligned_copy(weight.codes),
            "weight_scales": aligned_copy(weight.scale_bytes),
            "channel_scales": None if weight.channel_scales is None else aligned_copy(weight.channel_scales),
            "x_scale": None if static_scale is None else aligned_copy(np.array([static_scale], dtype=np.float32)),
            "bias": None if bias is None else aligned_copy(bias),
            "workspace": aligned_copy(np.full(size, 0xA5, dtype=np.uint8)),
        }
        self.c.emulation_reset()
        self.options(**options)
        for name, array in arrays.items():
            self.add_range(array, name, writable=name == "workspace")
        self.add_range(y[: m * n], "y", writable=True)
        groups = k // weight.group_size
        if trace:
            self.c.emulation_start_trace(m, n, groups)
        pointers = {name: None if a is None else a.ctypes.data for name, a in arrays.items()}
        args = Args(**pointers, y=y.ctypes.data, workspace_bytes=size)
        status = self.c.fptqW4A8Linear(ctypes.byref(desc), ctypes.byref(config), ctypes.byref(args), None)
        sums = np.zeros((m, n, groups), dtype=np.int64)
        if trace:
            sums = np.ctypeslib.as_array(self.c.emulation_trace(), shape=(m, n, groups)).copy()
        assert np.isnan(y[m * n :].astype(np.float32)).all(), "wrote past y"
        workspace = arrays["workspace"]
        assert workspace is not None
        return Result(
            status, y[: m * n].reshape(m, n), self.c.emulation_error().decode(), self.counters(), sums, workspace
        )


def gemm(tile: Shape, split_k: int = 1) -> Config:
    block_m, block_n, warp_m, warp_n, stages = tile
    return Config(GEMM, block_m, block_n, 64, warp_m, warp_n, stages, split_k)


def gemv(rows: int) -> Config:
    return Config(GEMV, rows, 16, 64, rows, 16, 4, 1)


Quantized = tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]
"""INT8 codes [m, padded k], scales [m] and row sums [m]."""


def quantize(
    kernels: Kernels, x: NDArray[Any], static_scale: float | None = None, offset: int = 0, reverse: bool = False
) -> Quantized:
    m, k = x.shape
    mode = PER_TOKEN if static_scale is None else STATIC
    desc = Desc(m, 8, k, 0, PER_CHANNEL, mode, OUTPUT_TYPES.index(x.dtype.type), 0)
    source = aligned_copy(x, offset)
    scale = aligned_copy(np.array([static_scale or 0.0], dtype=np.float32))
    codes = aligned_copy(np.full((m, padded(k, 64)), 99, dtype=np.int8))
    scales = aligned_copy(np.full(m, np.nan, dtype=np.float32))
    sums = aligned_copy(np.full(m, 99, dtype=np.int32))
    kernels.c.emulation_reset()
    kernels.options(reverse=reverse)
    for array, writable in ((source, False), (scale, False), (codes, True), (scales, True), (sums, True)):
        kernels.add_range(array, "array", writable=writable)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (source, scale, codes, scales, sums)]
    status = kernels.c.fptqQuantizeActivation(ctypes.byref(desc), *pointers, None)
    assert status == OK, kernels.c.emulation_error()
    return codes, scales, sums
