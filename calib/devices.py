"""The device that decoder blocks run on in calibration."""

from __future__ import annotations

import torch

from fptq_export.errors import UserError

__all__ = ["CPU", "device_from_option"]

CPU = torch.device("cpu")


def device_from_option(option: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Choose the device.

    Args:
        option: `auto` (a GPU where torch sees one), `cpu`, `cuda` or `cuda:1`.
        local_rank: Number of this process on its machine; each takes the GPU of its number.
        local_size: Processes on this machine.

    Raises:
        UserError: There is no such GPU, or several processes would share one.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if option == "cpu" or (option == "auto" and not gpus):
        return CPU
    where = f"--device {option}"
    name, _, index = option.partition(":")
    if not gpus:
        raise UserError(where, "torch sees no GPU", "use --device cpu, or install a torch built for CUDA")
    if index and local_size > 1:
        cause = f"{local_size} processes of this machine would share one GPU"
        raise UserError(where, cause, f"use --device {name}: each process takes its own")
    number = int(index) if index else local_rank
    if number >= gpus:
        cause = f"this machine has {gpus} GPU{'s' if gpus > 1 else ''}, and GPU {number} was asked for"
        raise UserError(where, cause, "start one process a GPU, or use --device cpu")
    return torch.device("cuda", number)
