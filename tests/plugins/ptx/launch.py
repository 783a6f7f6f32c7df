"""The product's calls, with its kernels interpreted: the emulator's harness, on the library of compile.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.plugins.emulation.harness import COUNTERS, Kernels, Result
from tests.plugins.ptx.machine import Bound, bind, execute
from tests.plugins.ptx.memory import Buffer, GlobalMemory
from tests.plugins.ptx.ptx_parser import Kernel, PtxError, kernel_from_text, kernel_texts
from tests.plugins.ptx.state import Launch

LAUNCH_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.c_void_p,
)
KEPT_KERNELS = 8
"""Instructions of a kernel take some megabytes."""
UNTRACED_ERROR = "the interpreter does not trace group sums"


@dataclass
class Program:
    """Kernels by name; each is read when it is launched, and the last ones are kept."""

    modules: dict[str, str]
    """PTX text by source."""
    edit: Callable[[str], str] | None = None
    """Changes the text of each kernel before it is read."""
    kernels: dict[str, tuple[Kernel, list[Bound]]] = field(default_factory=dict)

    @cached_property
    def texts(self) -> dict[str, str]:
        """PTX text of each kernel."""
        return {name: text for module in self.modules.values() for name, text in kernel_texts(module).items()}

    def kernel(self, name: str) -> tuple[Kernel, list[Bound]]:
        """A kernel, ready to run."""
        if name not in self.kernels:
            while len(self.kernels) >= KEPT_KERNELS:
                self.kernels.pop(next(iter(self.kernels)))
            text = self.texts[name]
            kernel = kernel_from_text(text if self.edit is None else self.edit(text))
            self.kernels[name] = kernel, bind(kernel)
        return self.kernels[name]


class Host:
    """The library's functions; those of the emulator that the harness calls are answered here."""

    def __init__(self, library: ctypes.CDLL, program: Program, *, runs: bool) -> None:
        self.runs = runs
        self.library = library
        self.program = program
        self.buffers: list[Buffer] = []
        self.failure: BaseException | None = None
        self.launches: list[tuple[str, int]] = []  # kernel and steps
        self.callback = LAUNCH_FUNCTION(self._launch)
        library.fptqWorkspaceBytes.restype = ctypes.c_size_t

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def emulation_reset(self) -> None:
        """Forgets the buffers of the last call."""
        self.buffers.clear()
        self.failure = None
        self.launches.clear()
        self.library.ptx_set_launch_function(self.callback)

    def emulation_add_range(self, start: ctypes.c_void_p, size: ctypes.c_int64, writable: int, name: bytes) -> None:
        """Lets kernels touch a buffer."""
        assert start.value is not None
        self.buffers.append(Buffer(start.value, size.value, name.decode(), bool(writable)))

    def emulation_error(self) -> bytes:
        """Why the last call failed."""
        return b"" if self.failure is None else str(self.failure).encode()

    def _launch(self, name: bytes, grid: Any, block: Any, shared_bytes: int, parameters: int) -> int:
        try:
            if not self.runs:
                self.launches.append((name.decode(), 0))
                return 0
            kernel, code = self.program.kernel(name.decode())
            if tuple(block.contents[1:]) != (1, 1):
                raise PtxError("only blocks with one dimension are supported")
            bytes_ = ctypes.string_at(parameters, kernel.param_bytes)
            memory = GlobalMemory(self.buffers)
            launch = Launch(tuple(grid.contents), block.contents[0], shared_bytes, bytes_, memory)
            self.launches.append((kernel.name, execute(kernel, code, launch)))
        except Exception as error:  # noqa: BLE001 - may not leave through C; the caller raises it again
            self.failure = error
            return 1
        return 0


class Interpreted(Kernels):
    """The library on the runtime double, with every launch interpreted, or only noted when `runs` is false."""

    def __init__(self, library: Path, program: Program, *, runs: bool = True) -> None:
        self.host = Host(ctypes.CDLL(str(library)), program, runs=runs)
        self.c: Any = self.host

    def options(self, **options: Any) -> None:
        """The emulator's options have no meaning here. Raises ValueError when one is given."""
        if any(options.values()):
            raise ValueError(f"not options of the interpreter: {', '.join(options)}")

    def counters(self) -> dict[str, int]:
        """Nothing is counted."""
        return dict.fromkeys(COUNTERS, 0)

    def linear(self, *args: Any, **options: Any) -> Result:
        """As Kernels.linear. Raises what stopped a kernel."""
        if options.get("trace"):
            raise ValueError(UNTRACED_ERROR)
        result = super().linear(*args, **options)
        if self.host.failure is not None:
            raise self.host.failure
        return result
