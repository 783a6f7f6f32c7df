"""Whether the command is one process of several: torchrun starts it once for each, and says so in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from calib.ranks import ALONE
from fptq_export.errors import UserError

if TYPE_CHECKING:
    from calib.ranks import Ranks

__all__ = ["connected", "is_first"]

_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def is_first() -> bool:
    """Whether this process speaks where all would say the same."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def connected() -> Iterator[Ranks]:
    """Connect to the other processes of the launch, if there are any, and let go of them at the end.

    Raises:
        UserError: The environment speaks of several processes and does not say where they meet.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield ALONE
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        cause = f"is {size} in the environment, but {missing[0]} is not set"
        raise UserError("WORLD_SIZE", cause, "start several processes with torchrun, or unset WORLD_SIZE for one")
    from calib.torch_ranks import TorchRanks

    ranks = TorchRanks(int(os.environ["RANK"]), int(size))
    try:
        yield ranks
    except (Exception, SystemExit):  # not an interrupt: that one comes to all processes
        ranks.close()
        raise
    ranks.close()
