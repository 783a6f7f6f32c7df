"""Status codes of the kernel boundary (`plugins/include/fptq/status.h`)."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """What a function of the kernel boundary returns."""

    OK = 0
    NULL_POINTER = 1
    BAD_SHAPE = 2
    BAD_GROUP_SIZE = 3
    BAD_ALIGNMENT = 4
    BAD_CONFIG = 5
    SMALL_WORKSPACE = 6
    UNSUPPORTED_DEVICE = 7
    CUDA_ERROR = 8
