"""How INT4 codes are laid out in memory.

One rule, that of ONNX and TensorRT: two codes a byte along the last axis, the first code in the four low bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["INT4_MAX", "INT4_MIN", "int4_from_packed", "packed_from_int4"]

INT4_MIN = -8
INT4_MAX = 7


def packed_from_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack INT4 codes two a byte.

    Args:
        codes: INT4 codes in [-8, 7], int8, shape [..., n], n even.

    Returns:
        uint8, shape [..., n/2]; code 2i in the low nibble of byte i, code 2i+1 in the high one.

    Raises:
        ValueError: n is odd or a code does not fit 4 bits.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of INT4 codes ({codes.shape[-1]} along the last axis)")
    if codes.size and (codes.min() < INT4_MIN or codes.max() > INT4_MAX):
        raise ValueError(f"INT4 codes lie in [{INT4_MIN}, {INT4_MAX}], got [{codes.min()}, {codes.max()}]")
    nibbles = codes.astype(np.uint8) & 0x0F
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).astype(np.uint8)


def int4_from_packed(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Unpack bytes written by `packed_from_int4`.

    Args:
        packed: uint8, shape [..., n/2].

    Returns:
        int8 codes in [-8, 7], shape [..., n].
    """
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.int8)
    signed = packed.view(np.int8)
    codes[..., 0::2] = np.left_shift(signed, 4) >> 4
    codes[..., 1::2] = signed >> 4
    return codes
