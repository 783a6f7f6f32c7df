// Packs INT4 weights into tile order (fptq/layout.h); the same bytes as fptq_export/packing.py.
//
// It writes the layout down a second time on purpose, byte by byte as the header words it, so that a slip in
// either packer shows; the plugin itself only reads packed weights.
#include "packing.h"

#include <cstring>

namespace {

constexpr int32_t kLanes = 32;
constexpr int32_t kLaneBytes = FPTQ_TILE_BYTES / kLanes;
static_assert(kLaneBytes == 16, "a lane reads its part of a tile with one 16-byte load");
static_assert(FPTQ_TILE_N * FPTQ_TILE_K / 2 == FPTQ_TILE_BYTES, "two codes a byte fill a tile");

FptqStatus CheckShape(int32_t n, int32_t k) {
  return n <= 0 || k <= 0 || n % FPTQ_MIN_N_MULTIPLE != 0 ? FPTQ_BAD_SHAPE : FPTQ_OK;
}

// Output and input channel of a nibble: byte `j` of word `w` of lane `lane`, low or high, inside its tile.
struct Place {
  int32_t n, k;
};

constexpr Place PlaceOf(int32_t lane, int32_t byte, int32_t high) {
  const int32_t word = byte / 4;
  const int32_t j = byte % 4;
  return {8 * (word / 2) + lane / 4, 32 * (word % 2) + 4 * (lane % 4) + j + 16 * high};
}

template <typename Visit>
void ForEachNibble(int32_t n, int32_t k, Visit visit) {
  const int32_t tiles_k = FPTQ_PADDED_K(k) / FPTQ_TILE_K;
  for (int32_t tile_n = 0; tile_n < FPTQ_PADDED_N(n) / FPTQ_TILE_N; ++tile_n) {
    for (int32_t tile_k = 0; tile_k < tiles_k; ++tile_k) {
      const size_t tile = (static_cast<size_t>(tile_n) * tiles_k + tile_k) * FPTQ_TILE_BYTES;
      for (int32_t lane = 0; lane < kLanes; ++lane) {
        for (int32_t byte = 0; byte < kLaneBytes; ++byte) {
          for (int32_t high = 0; high < 2; ++high) {
            const Place place = PlaceOf(lane, byte, high);
            const int32_t row = tile_n * FPTQ_TILE_N + place.n;
            const int32_t column = tile_k * FPTQ_TILE_K + place.k;
            if (row < n && column < k) {
              visit(static_cast<size_t>(row) * k + column, tile + lane * kLaneBytes + byte, 4 * high);
            }
          }
        }
      }
    }
  }
}

}  // namespace

extern "C" FptqStatus fptqPackTiles(const int8_t* codes, int32_t n, int32_t k, uint8_t* packed) {
  if (codes == nullptr || packed == nullptr) return FPTQ_NULL_POINTER;
  if (const FptqStatus status = CheckShape(n, k); status != FPTQ_OK) return status;
  for (size_t i = 0; i < static_cast<size_t>(n) * k; ++i) {
    if (codes[i] < -8 || codes[i] > 7) return FPTQ_BAD_CONFIG;
  }
  std::memset(packed, 0, FPTQ_PACKED_BYTES(n, k));
  ForEachNibble(n, k, [&](size_t code, size_t byte, int32_t shift) {
    packed[byte] = static_cast<uint8_t>(packed[byte] | (static_cast<uint8_t>(codes[code]) & 0x0F) << shift);
  });
  return FPTQ_OK;
}

extern "C" FptqStatus fptqUnpackTiles(const uint8_t* packed, int32_t n, int32_t k, int8_t* codes) {
  if (codes == nullptr || packed == nullptr) return FPTQ_NULL_POINTER;
  if (const FptqStatus status = CheckShape(n, k); status != FPTQ_OK) return status;
  ForEachNibble(n, k, [&](size_t code, size_t byte, int32_t shift) {
    const int32_t nibble = packed[byte] >> shift & 0x0F;
    codes[code] = static_cast<int8_t>(nibble >= 8 ? nibble - 16 : nibble);
  });
  return FPTQ_OK;
}

extern "C" FptqStatus fptqPackScales(const uint16_t* scales, int32_t n, int32_t groups, uint16_t* packed) {
  if (scales == nullptr || packed == nullptr) return FPTQ_NULL_POINTER;
  if (const FptqStatus status = CheckShape(n, groups); status != FPTQ_OK) return status;
  const int32_t padded_n = FPTQ_PADDED_N(n);
  for (int32_t group = 0; group < groups; ++group) {
    for (int32_t row = 0; row < padded_n; ++row) {
      packed[static_cast<size_t>(group) * padded_n + row] =
          row < n ? scales[static_cast<size_t>(row) * groups + group] : uint16_t{0};
    }
  }
  return FPTQ_OK;
}
