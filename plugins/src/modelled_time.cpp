#include "modelled_time.h"

#include <algorithm>
#include <cmath>

#include "gemm_tiles.h"
#include "kernels_internal.h"

namespace fptq {
namespace {

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

/* ---- what a kernel asks of it ---- */

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
 * Instructions that are no tensor-core step, for each step: conversion and scale pairs, folding, operands, and
 * what a k tile takes whatever its size. The sum of tests/plugins/gates/budgets.py, with what nvcc 13.0 spends
 * on 8.0 where that has what it may spend (fptq_export/roofline/instructions.json has the exact counts).
 */
double other_instructions(const FptqGemmDesc& desc, const FptqGemmConfig& c) {
  const double sixteens = c.warp_m / 16.0;
  const double groups = desc.group_size > 0 ? 32.0 / desc.group_size : 0.0;
  const double pairs = desc.scheme == FPTQ_TWO_LEVEL ? std::min(2.0, groups) : 0.0;
  const double conversion = ((desc.scheme == FPTQ_TWO_LEVEL ? 5.0 : 3.0) + 2.125 * pairs) / sixteens;
  const double fold = desc.scheme == FPTQ_GROUP ? (10.5 + 3.0 / sixteens) * groups : 0.0;
  const double operands = 8.0 / c.warp_n + 8.0 / c.warp_m;
  const double tile = desc.group_size > 0 ? 21.0 : 15.0;
  return conversion + fold + operands + tile * 64.0 / (c.warp_m * c.warp_n);
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

}  // namespace

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

}  // namespace fptq
