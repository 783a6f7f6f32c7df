"""A few PTX instructions as a kernel: one block, inputs and outputs of one 32-bit word a thread."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx.machine import bind, execute
from tests.plugins.ptx.memory import Buffer, GlobalMemory
from tests.plugins.ptx.ptx_parser import kernel_from_text
from tests.plugins.ptx.state import Launch

_TEXT = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 128 .b8 smem[];
.visible .entry snippet(
	.param .align 8 .b8 snippet_param_0[16]
)
{{
	.reg .pred %p<8>;
	.reg .b16 %h<8>;
	.reg .f32 %f<16>;
	.reg .b32 %r<64>;
	.reg .b32 %i<32>;
	.reg .b32 %o<32>;
	.reg .b64 %rd<16>;
	.reg .b64 %in, %out, %at;
	.reg .b32 %tid;
	mov.u32 %tid, %tid.x;
	mul.wide.u32 %at, %tid, 4;
	ld.param.u64 %in, [snippet_param_0];
	ld.param.u64 %out, [snippet_param_0+8];
	add.s64 %in, %in, %at;
	add.s64 %out, %out, %at;
	{loads}
	{body}
	{stores}
	ret;
}}
"""


def run(body: str, *inputs: Any, outputs: int = 1, threads: int = 32, shared_bytes: int = 0) -> list[NDArray[Any]]:
    """Executes `body` between loads of %i0, %i1, ... and stores of %o0, %o1, ....

    Args:
        body: Instructions.
        inputs: One 32-bit value a thread each, or one for all.
        outputs: How many.
        threads: Of the block.
        shared_bytes: Of `smem`.

    Returns:
        UINT32 [threads] of each output.
    """
    words = [np.broadcast_to(np.asarray(value), threads).astype(np.asarray(value).dtype) for value in inputs]
    source = np.zeros((max(1, len(words)), threads), dtype=np.uint32)
    for row, word in zip(source, words, strict=False):
        row[:] = np.ascontiguousarray(word).view(np.uint32)
    target = np.zeros((outputs, threads), dtype=np.uint32)
    loads = "\n".join(f"ld.global.u32 %i{i}, [%in+{4 * threads * i}];" for i in range(len(words)))
    stores = "\n".join(f"st.global.u32 [%out+{4 * threads * i}], %o{i};" for i in range(outputs))
    kernel = kernel_from_text(_TEXT.format(loads=loads, body=body, stores=stores))
    buffers = [
        Buffer(source.ctypes.data, source.nbytes, "input", writable=False),
        Buffer(target.ctypes.data, target.nbytes, "output", writable=True),
    ]
    parameters = struct.pack("QQ", source.ctypes.data, target.ctypes.data)
    assert ctypes.sizeof(ctypes.c_void_p) == 8
    execute(kernel, bind(kernel), Launch((1, 1, 1), threads, shared_bytes, parameters, GlobalMemory(buffers)))
    return list(target)


def signed(*values: int) -> NDArray[np.int32]:
    """INT32 for each thread, repeated over the warp."""
    return np.resize(np.array(values, dtype=np.int64), 32).astype(np.int32)


def unsigned(*values: int) -> NDArray[np.uint32]:
    """UINT32 for each thread, repeated over the warp."""
    return np.resize(np.array(values, dtype=np.int64), 32).astype(np.uint32)


def floats(*values: float) -> NDArray[np.float32]:
    """FP32 for each thread, repeated over the warp."""
    return np.resize(np.array(values, dtype=np.float32), 32)
