#include "config.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>

#include "bounds.h"
#include "fptq/layout.h"
#include "gemm_tiles.h"
#include "kernels_internal.h"

namespace fptq {
namespace {

/* A configuration that was thought of: either it has a modelled time, or a reason why it cannot be used. */
struct Candidate {
  FptqGemmConfig config;
  double microseconds;   /* modelled; for ordering only */
  const char* rejection; /* null: usable */
};

/* ---- what a streaming multiprocessor can do in a clock ---- */

/*
 * Specification values divided by multiprocessors and boost clock. They order candidates and predict no time
 * exactly; TensorRT's builder times the first few on the device itself.
 */
struct Machine {
  int compute_capability;
  double mma_clocks;      /* of a scheduler, for one m16n8k32 of INT8 */
  double bytes_per_clock; /* of device memory */
  double megahertz;
  int shared_memory_kib; /* of a multiprocessor, for all its blocks */
};
constexpr Machine kMachines[] = {
    {80, 8.0, 13.4, 1410, 164},  /* A100: 624 TOPS, 2.04 TB/s, 108 multiprocessors */
    {86, 16.0, 6.7, 1700, 100},  /* RTX 3090: 284 TOPS, 0.936 TB/s, 82 */
    {87, 16.0, 9.8, 1300, 164},  /* Orin: 0.205 TB/s, 16 */
    {89, 16.0, 3.1, 2520, 100},  /* RTX 4090: 660 TOPS, 1.008 TB/s, 128 */
    {90, 6.5, 13.9, 1830, 228},  /* H100: mma.sync reaches about 62 % of 1979 TOPS; 3.35 TB/s, 132 */
    {100, 8.0, 28.0, 1850, 228}, /* B200: rate of mma.sync not published, taken as A100's; 7.7 TB/s, 148 */
    {103, 8.0, 28.0, 1850, 228}, /* B300: as B200 */
    {110, 8.0, 9.0, 1570, 228},  /* Thor: 0.273 TB/s, 20 */
    {120, 16.0, 4.4, 2410, 100}, /* RTX 5090: 838 TOPS, 1.79 TB/s, 170 */
    {121, 16.0, 2.3, 2410, 100}, /* GB10: 0.273 TB/s, 48 */
};
constexpr double kSchedulers = 4.0;
constexpr double kMemoryLatency = 700.0;       /* clocks from a load to its data */
constexpr double kLaunchMicroseconds = 2.5;    /* of a kernel behind another one in a stream */
constexpr double kBlockStart = 1500.0;         /* clocks: pipeline fill, epilogue */
constexpr double kL2BytesPerClock = 40.0;      /* of a multiprocessor; A100: 5120 bytes a clock for 108 */
constexpr double kSharedBytesPerClock = 128.0; /* of a multiprocessor */
/* Part of the work of the units that do not bound a tile: overlap is not perfect. */
constexpr double kOverlapLoss = 1.0 / 3.0;
constexpr int kMaxThreadsPerMultiprocessor = 1536;
constexpr int kRegistersPerMultiprocessor = 65536;
constexpr int kBlockOverheadBytes = 1024; /* shared memory that the system takes from every block */

/* Newest machine that is not newer than the device. */
const Machine& machine_of(const FptqDevice& device) {
  const Machine* best = &kMachines[0];
  for (const Machine& machine : kMachines) {
    if (machine.compute_capability <= device.compute_capability) best = &machine;
  }
  return *best;
}

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

int ceil_divide(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

/* Whole groups: what split-K can hand out. In k tiles. */
int tiles_per_unit(const FptqGemmDesc& desc) {
  return desc.group_size > FPTQ_TILE_K ? desc.group_size / FPTQ_TILE_K : 1;
}
int k_tiles(const FptqGemmDesc& desc) { return FPTQ_PADDED_K(desc.k) / FPTQ_TILE_K; }

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

/* ---- modelled time ---- */

int threads_of(const FptqGemmConfig& c) { return 32 * (c.block_m / c.warp_m) * (c.block_n / c.warp_n); }

/*
 * Registers a thread: a bound on what nvcc 13.0 takes on any architecture, which tests/plugins/gates compare
 * with the machine code. Where a k tile ends several groups, the compiler moves their folds apart and keeps
 * more sums.
 */
int registers_of(const FptqGemmDesc& desc, const FptqGemmConfig& c) {
  const int sums = c.warp_m * c.warp_n / 32;
  int folding = 0;
  if (desc.scheme == FPTQ_GROUP) {
    folding = sums;
    if (desc.group_size == 32) folding += sums / 4;
    if (desc.group_size == 16) folding += 2 * sums;
  }
  return std::min(255, 64 + sums + folding + c.warp_m / 2);
}

/*
 * Instructions that are no tensor-core step, for each step: conversion and scale pairs, folding, copies and
 * addresses. Fitted to the machine code (fptq_export/roofline/instructions.json has the exact counts).
 */
double other_instructions(const FptqGemmDesc& desc, const FptqGemmConfig& c) {
  const double pairs = desc.scheme == FPTQ_TWO_LEVEL ? std::min(2.0, 32.0 / desc.group_size) : 0.0;
  const double conversion = ((desc.scheme == FPTQ_TWO_LEVEL ? 5.0 : 3.0) + 3.0 * pairs) * 16.0 / c.warp_m;
  const double fold = desc.scheme == FPTQ_GROUP ? 10.0 * 32.0 / desc.group_size : 0.0;
  const double loads = 12.0 * 16.0 / c.warp_m * 8.0 / c.warp_n + 0.7;
  return conversion + fold + loads;
}

double weight_bytes(const FptqGemmDesc& desc) {
  const double scales = desc.group_size > 0 ? 2.0 / desc.group_size : 0.0;
  return static_cast<double>(FPTQ_PADDED_N(desc.n)) * FPTQ_PADDED_K(desc.k) * (0.5 + scales);
}

/* Clocks of a multiprocessor for a k tile of a block: its slowest unit, and some of the others' work. */
double tile_clocks(const FptqGemmDesc& desc, const Machine& machine, const FptqGemmConfig& c) {
  const double steps = c.block_m / 16.0 * c.block_n / 8.0 * 2.0 / kSchedulers;
  const double arithmetic = steps * std::max(machine.mma_clocks, 1.0 + other_instructions(desc, c));
  const double from_l2 = (c.block_m * FPTQ_TILE_K + c.block_n * FPTQ_TILE_K / 2.0) / kL2BytesPerClock;
  const double warps = threads_of(c) / 32.0;
  const double from_shared =
      warps * (c.warp_m * FPTQ_TILE_K + c.warp_n * FPTQ_TILE_K / 2.0) / kSharedBytesPerClock;
  const double slowest = std::max({arithmetic, from_l2, from_shared});
  return slowest + kOverlapLoss * (arithmetic + from_l2 + from_shared - slowest);
}

double gemm_microseconds(const FptqGemmDesc& desc, const FptqDevice& device, const FptqGemmConfig& c) {
  const Machine& machine = machine_of(device);
  const double blocks =
      static_cast<double>(ceil_divide(desc.m, c.block_m)) * ceil_divide(desc.n, c.block_n) * c.split_k;
  const size_t shared = gemm_shared_bytes(desc, c) + kBlockOverheadBytes;
  const int resident =
      std::max(1, std::min({static_cast<int>(machine.shared_memory_kib * 1024 / static_cast<int>(shared)),
                            kMaxThreadsPerMultiprocessor / threads_of(c),
                            kRegistersPerMultiprocessor / (registers_of(desc, c) * threads_of(c))}));
  const double per_multiprocessor = std::ceil(blocks / device.multiprocessors);
  const double together = std::min<double>(resident, per_multiprocessor);
  const double waves = std::ceil(per_multiprocessor / together);
  const double tiles = std::ceil(static_cast<double>(k_tiles(desc)) / c.split_k);

  const double work = per_multiprocessor * tiles * tile_clocks(desc, machine, c);
  const double waiting = waves * tiles * kMemoryLatency / (c.stages - 1);
  const double clocks = std::max(work, waiting) + waves * kBlockStart;
  const double bytes = weight_bytes(desc) + static_cast<double>(desc.m) * (desc.k + 2.0 * desc.n);
  const double memory_clocks = bytes / (machine.bytes_per_clock * device.multiprocessors);
  double microseconds =
      std::max(clocks, memory_clocks + kBlockStart) / machine.megahertz + 2.0 * kLaunchMicroseconds;
  if (c.split_k > 1) {
    const double partial_bytes =
        8.0 * desc.m * FPTQ_PADDED_N(desc.n) * c.split_k; /* written and read, mostly in L2 */
    microseconds += kLaunchMicroseconds + partial_bytes / (2.0 * machine.bytes_per_clock *
                                                           device.multiprocessors * machine.megahertz);
  }
  return microseconds;
}

double gemv_microseconds(const FptqGemmDesc& desc, const FptqDevice& device) {
  const Machine& machine = machine_of(device);
  const double blocks = FPTQ_PADDED_N(desc.n) / FPTQ_TILE_N;
  const size_t shared = gemv_shared_bytes(desc) + kBlockOverheadBytes;
  const int resident =
      std::max(1, std::min(static_cast<int>(machine.shared_memory_kib * 1024 / static_cast<int>(shared)), 4));
  const double per_multiprocessor = std::ceil(blocks / device.multiprocessors);
  const double waves = std::ceil(per_multiprocessor / resident);
  /* A warp's instructions for a tile of 512 bytes, and for its part of quantizing x (about 20 for an
   * element). */
  const double folds = desc.scheme == FPTQ_GROUP ? 6.0 * desc.m * 64.0 / desc.group_size : 0.0;
  const double tile = 25.0 + 10.0 * desc.m + folds + (desc.scheme == FPTQ_TWO_LEVEL ? 8.0 : 0.0);
  const double quantize = 20.0 * desc.m * desc.k / 32.0;
  const double compute = per_multiprocessor * (k_tiles(desc) * tile + quantize) / kSchedulers;
  const double latency =
      std::ceil(static_cast<double>(k_tiles(desc)) / (kGemvWarps * kGemvDepth)) * kMemoryLatency;
  const double clocks = std::max(compute, waves * latency) + waves * kBlockStart;
  const double memory_clocks =
      weight_bytes(desc) / (machine.bytes_per_clock * device.multiprocessors) + kBlockStart;
  return std::max(clocks, memory_clocks) / machine.megahertz + kLaunchMicroseconds;
}

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
