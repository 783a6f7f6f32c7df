"""Ranks connected by torch.distributed, as torchrun starts them.

Ranks tell each other of errors at fixed points (`together`). The lowest rank that failed speaks; the others end without
a word and after it, so that one message is printed, and printed before a launcher ends the processes that are left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from fptq_export.errors import AnotherRankError, ExitCode, FptqError, UserError
from fptq_export.files import user_error_from_os_error

__all__ = ["TorchRanks"]

_TIMEOUT = timedelta(days=1)
"""Ranks wait while the first one traces, and for the slowest at the end of each block."""
_LAST_WORDS = timedelta(seconds=10)
"""How long silent ranks wait for the one that speaks to be gone."""


class TorchRanks:
    """Processes of one torch.distributed run, as torchrun starts them.

    Gloo carries what lies in host memory. NCCL carries what lies on a GPU; `use_gpu` opens it.

    Args:
        rank: Number of this process.
        size: How many there are. MASTER_ADDR and MASTER_PORT in the environment say where they meet.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._offered = False
        self._broken = False
        self._gpu_group: dist.ProcessGroup | None = None
        with self._connection():
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=_TIMEOUT)

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank))

    @property
    def local_size(self) -> int:
        """Processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def use_gpu(self, device: torch.device) -> None:
        """Let tensors on GPUs be reduced; every rank has one of its own."""
        torch.cuda.set_device(device)
        with self._connection():
            self._gpu_group = dist.new_group(backend="nccl", timeout=_TIMEOUT)

    def max_(self, tensor: torch.Tensor) -> None:
        """Reduce."""
        self._all_reduce(tensor, dist.ReduceOp.MAX)

    def min_(self, tensor: torch.Tensor) -> None:
        """Reduce."""
        self._all_reduce(tensor, dist.ReduceOp.MIN)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Reduce."""
        self._all_reduce(tensor, dist.ReduceOp.SUM)

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        with self._connection():
            dist.broadcast(tensor, src=0)

    def offer(self, job: str) -> None:
        """Rank 0 hands the others their work, which they wait for in `receive`; JSON, `null` for none."""
        self._offered = True
        data = torch.frombuffer(bytearray(job.encode()), dtype=torch.uint8)
        self.broadcast_(torch.tensor([len(data)]))
        self.broadcast_(data)

    def receive(self) -> str:
        """Wait for the work that rank 0 offers."""
        length = torch.zeros(1, dtype=torch.int64)
        self.broadcast_(length)
        data = torch.zeros(int(length), dtype=torch.uint8)
        self.broadcast_(data)
        return bytes(data.tolist()).decode()

    def close(self) -> None:
        """Let go of ranks that still wait for work, and of the connection."""
        if not self._broken:
            if self.rank == 0 and not self._offered:
                self.offer("null")
            dist.destroy_process_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Exchange at the end of the block whether it succeeded.

        Raises:
            AnotherRankError: It failed on another rank, which says why.
        """
        failure: Exception | None = None
        try:
            yield
        except AnotherRankError:
            raise
        except Exception as error:  # noqa: BLE001 - raised again below, once the other ranks know
            failure = error
        codes = torch.zeros(self.size, dtype=torch.int64)
        codes[self.rank] = _exit_code(failure)
        self.max_(codes)
        failed = codes.nonzero().flatten().tolist()
        if not failed:
            return
        self._broken = True
        if failed[0] == self.rank and failure is not None:
            raise failure
        self._outlive(failed[0])
        raise AnotherRankError(ExitCode(int(codes[failed[0]]))) from None

    def _all_reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        with self._connection():
            dist.all_reduce(tensor, operation, group=self._gpu_group if tensor.is_cuda else None)

    def _outlive(self, rank: int) -> None:
        """Wait until another rank has ended: its side of the connection closes."""
        try:
            work = dist.irecv(torch.zeros(1), src=rank)
            if work is not None:
                work.wait(_LAST_WORDS)
        except RuntimeError:
            return

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """Turn a lost connection into an error of the user's side; rank 0 speaks."""
        try:
            yield
        except RuntimeError as error:
            self._broken = True
            # Gloo has no exception type of its own; what it says starts with the file of its transport.
            if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
                raise
            if self.rank != 0:
                raise AnotherRankError(ExitCode.USER_ERROR) from None
            raise UserError(
                f"calibration in {self.size} processes",
                "the connection to another process is lost",
                "see its own message; without one it was killed, often for want of memory: start fewer processes",
            ) from error


def _exit_code(failure: Exception | None) -> int:
    if failure is None:
        return ExitCode.OK
    if isinstance(failure, OSError):
        mendable = user_error_from_os_error(failure)
        return ExitCode.BUG if mendable is None else mendable.exit_code
    return failure.exit_code if isinstance(failure, FptqError) else ExitCode.BUG
