/*
 * Memory layout of packed weights: one definition for the kernels, the C++ packer and fptq_export/packing.py.
 *
 * Codes. INT4 in [-8, 7], logical shape [N, K], stored in the order in which a warp reads the B operand of
 * mma.m16n8k32: tiles of 16 output channels x 64 input channels, tile index (n / 16) * (K_padded / 64) + k / 64.
 * A tile is 32 lanes x 16 bytes = 512 bytes. Lane l holds four 32-bit words w = 0..3; word w covers output channels
 * 8 * (w / 2) .. + 7 and input channels 32 * (w % 2) .. + 31 of the tile. Byte j of a word holds two codes of output
 * channel n = 8 * (w / 2) + l / 4: the low nibble is input channel k = 32 * (w % 2) + 4 * (l % 4) + j, the high nibble
 * is k + 16. N is padded to a multiple of 16 and K to a multiple of 64, with zeros.
 *
 * Group scales. FP16, logical shape [N, K / group_size], stored [K / group_size][N_padded]: a row holds the scales of
 * one group for all output channels. group_size 0 means per channel: [1][N_padded]. Padding is zero. A scale may be
 * negative (the largest weight of the group maps to -8, so that all 16 levels are used).
 *
 * two_level. Codes are unsigned, u = w + 8 in [0, 15]. The first-level scale of a group is a positive integer s1
 * (1..17) with an offset, so that the INT8 weight s1 * u - z lies in [-119, 119] (QoQ, arXiv 2405.04532); stored as
 * uint8 s1 and uint8 a = 128 - z per group, [K / group_size][N_padded][2]; the second-level scale is one FP32 a channel.
 */
#ifndef FPTQ_LAYOUT_H
#define FPTQ_LAYOUT_H

#define FPTQ_TILE_N 16
#define FPTQ_TILE_K 64
#define FPTQ_TILE_BYTES 512
#define FPTQ_POINTER_ALIGNMENT 16
#define FPTQ_MIN_N_MULTIPLE 8
#define FPTQ_NUM_GROUP_SIZES 4
#define FPTQ_GROUP_SIZES {128, 64, 32, 16}
#define FPTQ_LAYOUT_VERSION 1

#define FPTQ_ROUND_UP(value, multiple) (((value) + (multiple)-1) / (multiple) * (multiple))
#define FPTQ_PADDED_N(n) FPTQ_ROUND_UP(n, FPTQ_TILE_N)
#define FPTQ_PADDED_K(k) FPTQ_ROUND_UP(k, FPTQ_TILE_K)
/* Bytes of the packed codes of an [N, K] weight. */
#define FPTQ_PACKED_BYTES(n, k) ((size_t)FPTQ_PADDED_N(n) * FPTQ_PADDED_K(k) / 2)

#endif /* FPTQ_LAYOUT_H */
