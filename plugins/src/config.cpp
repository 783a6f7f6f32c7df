#include "config.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>

#include "bounds.h"
#include "fptq/layout.h"
#include "gemm_tiles.h"
#include "kernels_internal.h"
#include "modelled_time.h"

namespace fptq {
namespace {

/* A configuration that was thought of: either it has a modelled time, or a reason why it cannot be used. */
struct Candidate {
  FptqGemmConfig config;
  double microseconds;   /* modelled; for ordering only */
  const char* rejection; /* null: usable */
};

/* ---- the configurations that exist ---- */

struct TileShape {
  int block_m, block_n, warp_m, warp_n, stages;
};
constexpr TileShape kTileShapes[] = {
#define FPTQ_GEMM_TILE(BM, BN, WM, WN, STAGES) {BM, BN, WM, WN, STAGES},
    FPTQ_GEMM_TILES(FPTQ_GEMM_TILE)
#undef FPTQ_GEMM_TILE
};
constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};
/* The GEMV, and every tile with every split. */
constexpr size_t kMaxCandidates = 1 + std::size(kTileShapes) * std::size(kSplits);
constexpr int kMinTilesPerSplit = 4; /* below, filling the pipeline costs more than the work */

/* Whole groups: what split-K can hand out. In k tiles. */
int tiles_per_unit(const FptqGemmDesc& desc) {
  return desc.group_size > FPTQ_TILE_K ? desc.group_size / FPTQ_TILE_K : 1;
}

FptqGemmConfig gemv_config(const FptqGemmDesc& desc) {
  return {FPTQ_KERNEL_GEMV, desc.m, FPTQ_TILE_N, FPTQ_TILE_K, desc.m, FPTQ_TILE_N, kGemvDepth, 1};
}
FptqGemmConfig gemm_config(const TileShape& t, int split_k) {
  return {FPTQ_KERNEL_GEMM, t.block_m, t.block_n, FPTQ_TILE_K, t.warp_m, t.warp_n, t.stages, split_k};
}

bool same_tile(const TileShape& t, const FptqGemmConfig& c) {
  return c.block_m == t.block_m && c.block_n == t.block_n && c.block_k == FPTQ_TILE_K &&
         c.warp_m == t.warp_m && c.warp_n == t.warp_n && c.stages == t.stages;
}

const char* gemm_error(const FptqGemmDesc& desc, const FptqGemmConfig& config) {
  const auto known = [&](const TileShape& t) { return same_tile(t, config); };
  if (std::none_of(std::begin(kTileShapes), std::end(kTileShapes), known))
    return "no kernel is compiled for this tile";
  if (!tile_fits_registers(config.warp_m, config.warp_n, desc.scheme == FPTQ_GROUP, desc.group_size)) {
    return "INT32 and FP32 sums of this warp tile do not fit the registers";
  }
  if (!tile_keeps_pace(config.warp_m, config.warp_n, desc.scheme == FPTQ_TWO_LEVEL, desc.group_size)) {
    return "scale pairs of groups of 16 would hold up the tensor cores of this warp tile";
  }
  if (config.split_k < 1 || config.split_k > k_tiles(desc) / tiles_per_unit(desc)) {
    return "split-K leaves a block without a whole group";
  }
  return nullptr;
}

const char* gemv_error(const FptqGemmDesc& desc, const FptqGemmConfig& config) {
  if (desc.m > kGemvMaxRows) return "the GEMV holds at most 4 rows";
  const FptqGemmConfig expected = gemv_config(desc);
  return std::memcmp(&expected, &config, sizeof(config)) == 0
             ? nullptr
             : "the GEMV was configured for another number of rows";
}

/* ---- candidates ---- */

Candidate gemv_candidate(const FptqGemmDesc& desc, const FptqDevice& device) {
  Candidate candidate = {gemv_config(desc), 0.0, gemv_error(desc, gemv_config(desc))};
  if (candidate.rejection != nullptr) return candidate;
  if (gemv_shared_bytes(desc) > static_cast<size_t>(device.shared_memory_bytes)) {
    candidate.rejection = "the quantized rows do not fit the shared memory of a block";
    return candidate;
  }
  candidate.microseconds = gemv_microseconds(desc, device);
  return candidate;
}

Candidate gemm_candidate(const FptqGemmDesc& desc, const FptqDevice& device, const TileShape& tile,
                         int split_k) {
  const FptqGemmConfig config = gemm_config(tile, split_k);
  Candidate candidate = {config, 0.0, gemm_error(desc, config)};
  const int64_t blocks =
      static_cast<int64_t>(ceil_divide(desc.m, tile.block_m)) * ceil_divide(desc.n, tile.block_n);
  if (candidate.rejection != nullptr) return candidate;
  if (gemm_shared_bytes(desc, config) > static_cast<size_t>(device.shared_memory_bytes)) {
    candidate.rejection = "the pipeline does not fit the shared memory of a block";
  } else if (tile.block_m > 16 && tile.block_m >= 2 * FPTQ_ROUND_UP(desc.m, 16)) {
    candidate.rejection = "at least half of the tile's rows would be padding";
  } else if (split_k > 1 && k_tiles(desc) / split_k < kMinTilesPerSplit) {
    candidate.rejection = "a part of K would be too short to fill the pipeline";
  } else if (split_k > 1 && blocks * split_k > 2 * static_cast<int64_t>(device.multiprocessors)) {
    candidate.rejection = "the device is full without splitting K this often";
  } else {
    candidate.microseconds = gemm_microseconds(desc, device, config);
  }
  return candidate;
}

/* ---- all of them, in order ---- */

/* Every candidate in a fixed array: no allocation, so nothing here can throw (the files are built without
 * exceptions). Usable ones first, best first; then the rejected; equals in the order they were added. */
class Ranking {
 public:
  Ranking(const FptqGemmDesc& desc, const FptqDevice& device) {
    insert(gemv_candidate(desc, device));
    for (const TileShape& tile : kTileShapes) {
      for (const int split_k : kSplits) {
        const Candidate candidate = gemm_candidate(desc, device, tile, split_k);
        insert(candidate);
        if (split_k == 1 && candidate.rejection != nullptr)
          break; /* the tile itself: one reason is enough */
      }
    }
  }
  const Candidate* begin() const { return candidates_; }
  const Candidate* end() const { return candidates_ + count_; }

 private:
  static bool before(const Candidate& a, const Candidate& b) {
    if ((a.rejection == nullptr) != (b.rejection == nullptr)) return a.rejection == nullptr;
    return a.rejection == nullptr && a.microseconds < b.microseconds;
  }
  void insert(const Candidate& candidate) {
    size_t place = count_++;
    for (; place > 0 && before(candidate, candidates_[place - 1]); --place)
      candidates_[place] = candidates_[place - 1];
    candidates_[place] = candidate;
  }

  Candidate candidates_[kMaxCandidates];
  size_t count_ = 0;
};

/* One line: kernel, tiles, stages, split; then the modelled time or the reason against it. As snprintf. */
int print_candidate(char* text, size_t capacity, const Candidate& candidate) {
  const FptqGemmConfig& c = candidate.config;
  char kernel[128];
  if (c.kernel == FPTQ_KERNEL_GEMV) {
    std::snprintf(kernel, sizeof(kernel), "gemv rows %d, channels %d", c.block_m, c.block_n);
  } else {
    std::snprintf(kernel, sizeof(kernel), "gemm tile %dx%dx%d, warp %dx%d, %d stages, split-K %d", c.block_m,
                  c.block_n, c.block_k, c.warp_m, c.warp_n, c.stages, c.split_k);
  }
  if (candidate.rejection != nullptr)
    return std::snprintf(text, capacity, "%s: rejected: %s\n", kernel, candidate.rejection);
  return std::snprintf(text, capacity, "%s: %.1f us modelled\n", kernel, candidate.microseconds);
}

}  // namespace

FptqStatus check_desc(const FptqGemmDesc& desc) {
  if (desc.m < 1 || desc.n < 1 || desc.k < 1 || desc.n % FPTQ_MIN_N_MULTIPLE != 0 || desc.k > kMaxK)
    return FPTQ_BAD_SHAPE;
  constexpr int kGroupSizes[FPTQ_NUM_GROUP_SIZES] = FPTQ_GROUP_SIZES;
  const bool known_group =
      std::find(std::begin(kGroupSizes), std::end(kGroupSizes), desc.group_size) != std::end(kGroupSizes);
  const bool per_channel = desc.scheme == FPTQ_PER_CHANNEL;
  if (desc.scheme != FPTQ_PER_CHANNEL && desc.scheme != FPTQ_GROUP && desc.scheme != FPTQ_TWO_LEVEL)
    return FPTQ_BAD_GROUP_SIZE;
  if (per_channel ? desc.group_size != 0 : !known_group) return FPTQ_BAD_GROUP_SIZE;
  return !per_channel && desc.k % desc.group_size != 0 ? FPTQ_BAD_SHAPE : FPTQ_OK;
}

FptqStatus check_device(const FptqDevice& device) {
  const bool usable =
      device.compute_capability >= 80 && device.multiprocessors >= 1 && device.shared_memory_bytes > 0;
  return usable ? FPTQ_OK : FPTQ_UNSUPPORTED_DEVICE;
}

const char* config_error(const FptqGemmDesc& desc, const FptqGemmConfig& config) {
  if (config.kernel == FPTQ_KERNEL_GEMV) return gemv_error(desc, config);
  if (config.kernel == FPTQ_KERNEL_GEMM) return gemm_error(desc, config);
  return "unknown kernel";
}

size_t gemm_shared_bytes(const FptqGemmDesc& desc, const FptqGemmConfig& config) {
  const int groups_per_tile = desc.group_size == 0 ? 0 : std::max(1, FPTQ_TILE_K / desc.group_size);
  const size_t stage = static_cast<size_t>(config.block_m) * FPTQ_TILE_K +
                       static_cast<size_t>(config.block_n) * FPTQ_TILE_K / 2 +
                       static_cast<size_t>(groups_per_tile) * static_cast<size_t>(config.block_n) * 2;
  return stage * static_cast<size_t>(config.stages);
}

}  // namespace fptq

/* ---- the boundary ---- */

extern "C" {

FptqStatus fptqCandidates(const FptqGemmDesc* desc, const FptqDevice* device, FptqGemmConfig* configs,
                          int32_t capacity, int32_t* count) {
  if (desc == nullptr || device == nullptr || count == nullptr || (configs == nullptr && capacity > 0))
    return FPTQ_NULL_POINTER;
  *count = 0;
  if (const FptqStatus status = fptq::check_desc(*desc); status != FPTQ_OK) return status;
  if (const FptqStatus status = fptq::check_device(*device); status != FPTQ_OK) return status;
  for (const fptq::Candidate& candidate : fptq::Ranking(*desc, *device)) {
    if (candidate.rejection != nullptr || *count >= capacity) break;
    configs[(*count)++] = candidate.config;
  }
  return FPTQ_OK;
}

FptqStatus fptqChooseConfig(const FptqGemmDesc* desc, const FptqDevice* device, FptqGemmConfig* config) {
  int32_t count = 0;
  if (config == nullptr) return FPTQ_NULL_POINTER;
  const FptqStatus status = fptqCandidates(desc, device, config, 1, &count);
  if (status != FPTQ_OK) return status;
  return count == 1 ? FPTQ_OK : FPTQ_UNSUPPORTED_DEVICE;
}

int32_t fptqExplainConfigs(const FptqGemmDesc* desc, const FptqDevice* device, char* text, int32_t capacity) {
  if (desc == nullptr || device == nullptr) return -FPTQ_NULL_POINTER;
  if (const FptqStatus status = fptq::check_desc(*desc); status != FPTQ_OK) return -status;
  if (const FptqStatus status = fptq::check_device(*device); status != FPTQ_OK) return -status;
  const size_t room = text != nullptr && capacity > 0 ? static_cast<size_t>(capacity) : 0;
  if (room > 0) text[0] = '\0';
  size_t length = 0;
  for (const fptq::Candidate& candidate : fptq::Ranking(*desc, *device)) {
    const bool fits = length < room;
    const int written =
        fptq::print_candidate(fits ? text + length : nullptr, fits ? room - length : 0, candidate);
    if (written > 0) length += static_cast<size_t>(written);
  }
  return static_cast<int32_t>(length) + 1;
}

}  // extern "C"
