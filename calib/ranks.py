"""Several processes calibrate one model together: what they exchange, and which windows each of them runs.

Each process is a rank. Sums and maxima over all windows are reductions over the ranks; see `torch_ranks` for how.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from fptq_export.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["ALONE", "OneProcess", "Ranks", "share_of_rank"]


class Ranks(Protocol):
    """This process among those that calibrate together. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process; 0 is the one that writes the results."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""

    @property
    def local_size(self) -> int:
        """Processes on this machine."""

    def use_gpu(self, device: torch.device) -> None:
        """Let tensors on GPUs be reduced; every rank has a GPU of its own."""

    def max_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the elementwise maximum over the ranks."""

    def min_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the elementwise minimum over the ranks."""

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum over the ranks; the same bits on each."""

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by that of rank 0."""

    def offer(self, job: str) -> None:
        """Hand the other ranks their work, which they wait for. Rank 0 only; JSON, `null` for none."""

    def receive(self) -> str:
        """Wait for the work that rank 0 offers. Other ranks only."""

    def together(self) -> AbstractContextManager[None]:
        """Run a block that may fail on any rank; at its end it has succeeded on all, or every rank raises."""


class OneProcess:
    """No other process: nothing to exchange."""

    rank = local_rank = 0
    size = local_size = 1

    def use_gpu(self, device: torch.device) -> None:
        """Do nothing."""

    def max_(self, tensor: torch.Tensor) -> None:
        """Leave it."""

    def min_(self, tensor: torch.Tensor) -> None:
        """Leave it."""

    def sum_(self, tensor: torch.Tensor) -> None:
        """Leave it."""

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Leave it."""

    def offer(self, job: str) -> None:
        """Do nothing."""

    def receive(self) -> str:
        """Nobody offers any."""
        return "null"

    def together(self) -> AbstractContextManager[None]:
        """Run the block."""
        return nullcontext()


ALONE = OneProcess()


def share_of_rank(windows: int, batch_size: int, ranks: Ranks) -> tuple[slice, int]:
    """Which windows a rank runs, and how many of them in a forward pass.

    Ranks share whole batches. The batches are those of one process as long as each rank gets a full one, and then
    maxima are equal to the bit; smaller batches may differ in the last bit of a float sum.

    Args:
        windows: Of all ranks.
        batch_size: Windows a forward pass, in one process.
        ranks: This rank among all.

    Raises:
        UserError: There are fewer windows than ranks.
    """
    if windows < ranks.size:
        cause = f"{windows} windows of text for {ranks.size} processes"
        raise UserError("--calib-size", cause, "start fewer processes, or give more samples or more text")
    size = min(batch_size, windows // ranks.size)
    batches = -(-windows // size)
    first, last = (batches * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    return slice(first * size, min(last * size, windows)), size
