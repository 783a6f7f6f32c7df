"""How INT4 codes are laid out in memory.

In files, by the rule of ONNX and TensorRT: two codes a byte along the last axis, the first code in the four low bits.
For the kernels of the plugin, in tiles (`plugins/include/fptq/layout.h`, which has the constants below too).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "INT4_MAX",
    "INT4_MIN",
    "LAYOUT_VERSION",
    "OUT_MULTIPLE",
    "TILE_IN",
    "TILE_OUT",
    "groups_from_packed_scales",
    "int4_from_packed",
    "int4_from_packed_tiles",
    "packed_from_int4",
    "packed_scales_from_groups",
    "packed_tiles_from_int4",
    "padded_shape",
]

INT4_MIN = -8
INT4_MAX = 7
TILE_OUT = 16
TILE_IN = 64
OUT_MULTIPLE = 8
"""What the number of output channels must be a multiple of."""
LAYOUT_VERSION = 1


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


def packed_tiles_from_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack the codes of a weight in the order in which the W4A8 kernels read them (`plugins/include/fptq/layout.h`).

    A tile holds 16 output x 64 input channels; lane l of a warp reads 16 bytes of it. Byte j of word w of lane l holds
    the codes of output channel 8 (w // 2) + l // 4: input channel 32 (w % 2) + 4 (l % 4) + j in the low nibble, and the
    channel 16 further in the high one.

    Args:
        codes: INT4 codes in [-8, 7], int8, shape [out, in], out a multiple of 8.

    Returns:
        uint8, flat: `PADDED_OUT x PADDED_IN / 2` bytes; padding is zero.

    Raises:
        ValueError: `out` is not a multiple of 8, a size is zero, or a code does not fit 4 bits.
    """
    n, k = codes.shape
    padded_n, padded_k = padded_shape(n, k)
    if codes.min() < INT4_MIN or codes.max() > INT4_MAX:
        raise ValueError(f"INT4 codes lie in [{INT4_MIN}, {INT4_MAX}], got [{codes.min()}, {codes.max()}]")
    padded = np.zeros((padded_n, padded_k), dtype=np.uint8)
    padded[:n, :k] = codes.view(np.uint8) & 0x0F
    # Axes: tile_n, word / 2, lane / 4, tile_k, word % 2, nibble, lane % 4, byte of the word.
    split = padded.reshape(padded_n // TILE_OUT, 2, 8, padded_k // TILE_IN, 2, 2, 4, 4)
    nibbles = split.transpose(5, 0, 3, 2, 6, 1, 4, 7)
    packed: NDArray[np.uint8] = (nibbles[0] | (nibbles[1] << 4)).reshape(-1)
    return packed


def int4_from_packed_tiles(packed: NDArray[np.uint8], out_features: int, in_features: int) -> NDArray[np.int8]:
    """Undo `packed_tiles_from_int4`.

    Args:
        packed: uint8, flat.
        out_features: Output channels before padding.
        in_features: Input channels before padding.

    Returns:
        int8 codes in [-8, 7], shape [out, in].

    Raises:
        ValueError: The number of bytes does not belong to that shape.
    """
    padded_n, padded_k = padded_shape(out_features, in_features)
    if packed.size != padded_n * padded_k // 2:
        wanted = padded_n * padded_k // 2
        raise ValueError(f"{packed.size} bytes do not hold [{out_features}, {in_features}], which takes {wanted}")
    # Axes: tile_n, tile_k, lane / 4, lane % 4, word / 2, word % 2, byte of the word.
    tiles = packed.reshape(padded_n // TILE_OUT, padded_k // TILE_IN, 8, 4, 2, 2, 4)
    nibbles = np.stack([tiles & 0x0F, tiles >> 4])
    codes = nibbles.transpose(1, 5, 3, 2, 6, 0, 4, 7).reshape(padded_n, padded_k)[:out_features, :in_features]
    return np.left_shift(np.ascontiguousarray(codes).view(np.int8), 4) >> 4


def packed_scales_from_groups(scales: NDArray[np.float16]) -> NDArray[np.float16]:
    """Group scales in the order of the kernels: [out, groups] -> [groups, padded out], padding zero.

    Raises:
        ValueError: `out` is not a multiple of 8, or a size is zero.
    """
    n, groups = scales.shape
    padded_n, _ = padded_shape(n, groups)
    packed = np.zeros((groups, padded_n), dtype=scales.dtype)
    packed[:, :n] = scales.T
    return packed


def groups_from_packed_scales(packed: NDArray[np.float16], out_features: int) -> NDArray[np.float16]:
    """Undo `packed_scales_from_groups`: [groups, padded out] -> [out, groups].

    Raises:
        ValueError: The padded size does not belong to `out_features`.
    """
    padded_n, _ = padded_shape(out_features, 1)
    if packed.shape[1] != padded_n:
        raise ValueError(f"scales of {out_features} output channels have rows of {padded_n}, not {packed.shape[1]}")
    return np.ascontiguousarray(packed[:, :out_features].T)


def padded_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """(out, in) rounded up to whole tiles. Raises ValueError for a shape that the kernels do not take."""
    if out_features <= 0 or in_features <= 0 or out_features % OUT_MULTIPLE:
        raise ValueError(f"the kernels take a multiple of {OUT_MULTIPLE} output channels, got {out_features}")
    return -(-out_features // TILE_OUT) * TILE_OUT, -(-in_features // TILE_IN) * TILE_IN
