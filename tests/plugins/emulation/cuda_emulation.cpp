/* The engine behind cuda_emulation.h, and the C functions through which a test
 * sets it up and reads what it found. */
#include "cuda_emulation.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace fptq::emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kBanks = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedAlignment = 1024;
constexpr uint8_t kPoison = 0xA5;

/* ---- fibers: one stack a CUDA thread, switched by hand because swapcontext
 * makes a system call ---- */

extern "C" void fptq_switch_stack(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl fptq_switch_stack
fptq_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#else
#error "the emulator switches fibers with x86-64 code; add the six callee-saved registers of this machine"
#endif

struct Fiber {
  void* stack_pointer = nullptr;
  bool done = false;
};

/* ---- state of a block ---- */

struct AsyncCopy {
  unsigned char* smem;
  const unsigned char* gmem;
  bool valid;
};

struct Thread {
  std::vector<std::vector<AsyncCopy>> groups; /* committed, oldest first */
  std::vector<AsyncCopy> open;
};

/* A word of shared memory: who touched it since the last barrier. */
struct Shadow {
  uint32_t write_epoch = 0, read_epoch = 0;
  int16_t writer = -1, reader = -1;
  bool shared_read = false; /* more than one reader in read_epoch */
  uint8_t pending = 0;      /* cp.async under way */
  bool written = false;
};

/* Where the lanes of a warp meet. */
struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
  int operation = 0;
  uint32_t line = 0, column = 0;
  std::array<const void*, kWarp> in{};
  std::array<void*, kWarp> out{};
};

struct MultiplyInput {
  Matrix kind;
  const uint32_t* a;
  const uint32_t* b;
  const int* c;
};

struct ShuffleInput {
  unsigned char bytes[8];
  size_t size;
  int mask;
};

constexpr size_t kInactive = SIZE_MAX;

/* The nth load of each lane at one place of the source, lined up to count bank conflicts. */
struct LoadSlot {
  size_t bytes = 0;
  std::vector<size_t> offsets = std::vector<size_t>(kWarp, kInactive);
};

struct Block {
  int x = 0, y = 0, num_threads = 0, current = 0;
  uint32_t epoch = 1;
  int waiting_at_barrier = 0;
  uint64_t barrier_generation = 0;
  uint32_t barrier_line = 0;
  uint64_t progress = 0;
  void* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Thread> threads;
  std::vector<Rendezvous> warps;
  std::vector<Shadow> shadow;
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::map<std::tuple<int, uint32_t, uint32_t, int>, LoadSlot> loads; /* warp, line, column, occurrence */
  std::map<std::tuple<int, uint32_t, uint32_t>, int> load_count;      /* thread, line, column */
};

struct Range {
  const unsigned char* begin;
  size_t bytes;
  bool writable;
  std::string name;
  std::vector<int64_t> writer; /* of each word in this launch; -1 none */
  std::vector<int64_t> reader; /* -1 none, -2 several */
};

struct Counters {
  int64_t bank_conflicts_ldmatrix, bank_conflicts_load, multiplies, matrix_loads, async_copies, barriers,
      threads_run;
};

struct State {
  Block block;
  std::vector<Range> ranges;
  Counters counters{};
  std::string error;
  bool failed = false;
  bool count_load_conflicts = false;
  bool reverse_order = false; /* run threads from the last to the first */
  int64_t block_index = 0;
  int64_t fail_launch = -1; /* launch number to refuse, as CUDA would */
  int64_t launches = 0;
  int trace_columns = 0, trace_groups = 0;
  std::vector<int64_t> trace;
  std::vector<std::vector<unsigned char>> stacks;
};

State& state() {
  static State instance;
  return instance;
}

void yield_to_scheduler() {
  Block& b = state().block;
  fptq_switch_stack(&b.fibers[b.current].stack_pointer, b.scheduler);
}

void finish_copies(Thread& thread, size_t keep);

void fiber_entry() {
  Block& b = state().block;
  (*b.body)();
  if (!b.threads[b.current].open.empty()) fail("a thread ends with a cp.async that was never committed");
  for (const auto& group : b.threads[b.current].groups) {
    if (!group.empty()) fail("a thread ends while its cp.async is under way");
  }
  b.fibers[b.current].done = true;
  ++b.progress;
  for (;;) yield_to_scheduler();
}

void prepare_fibers() {
  State& s = state();
  Block& b = s.block;
  while (s.stacks.size() < static_cast<size_t>(b.num_threads)) s.stacks.emplace_back(kStackBytes);
  for (int i = 0; i < b.num_threads; ++i) {
    const uintptr_t top = (reinterpret_cast<uintptr_t>(s.stacks[i].data()) + kStackBytes) & ~uintptr_t{63};
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr; /* fiber_entry never returns; this keeps its stack aligned */
    *--slot = reinterpret_cast<void*>(&fiber_entry);
    for (int r = 0; r < 6; ++r) *--slot = nullptr;
    b.fibers[i].stack_pointer = slot;
    b.fibers[i].done = false;
  }
}

void count_load_conflicts_of_block();

bool run_block(int x, int y, int num_threads, size_t shared_bytes, const std::function<void()>& body) {
  State& s = state();
  s.block = Block{};
  Block& b = s.block;
  b.x = x;
  b.y = y;
  b.num_threads = num_threads;
  b.body = &body;
  b.fibers.resize(num_threads);
  b.threads.resize(num_threads);
  b.warps.resize((num_threads + kWarp - 1) / kWarp);
  b.storage.assign(shared_bytes + kSharedAlignment, kPoison);
  b.shared = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(b.storage.data()) + kSharedAlignment - 1) / kSharedAlignment *
      kSharedAlignment);
  b.shared_bytes = shared_bytes;
  b.shadow.resize(shared_bytes / 4 + 1);
  prepare_fibers();
  for (;;) {
    const uint64_t before = b.progress;
    bool all_done = true;
    for (int i = 0; i < num_threads; ++i) {
      const int thread = s.reverse_order ? num_threads - 1 - i : i;
      if (b.fibers[thread].done) continue;
      b.current = thread;
      fptq_switch_stack(&b.scheduler, b.fibers[thread].stack_pointer);
      if (s.failed) return false;
      all_done = all_done && b.fibers[thread].done;
    }
    if (all_done) break;
    if (b.progress == before) {
      s.failed = true;
      s.error =
          "deadlock: threads wait at a barrier or warp operation that "
          "others never reach";
      return false;
    }
  }
  s.counters.threads_run += num_threads;
  if (s.count_load_conflicts) count_load_conflicts_of_block();
  return true;
}

/* Worst number of words in one bank, minus one, over the transactions of a
 * warp-wide access. */
int conflicts_of(const std::vector<size_t>& offsets, size_t bytes) {
  const size_t lanes_at_once = bytes <= 4 ? 32 : 128 / bytes;
  int conflicts = 0;
  for (size_t first = 0; first < offsets.size(); first += lanes_at_once) {
    std::array<std::vector<size_t>, kBanks> words;
    for (size_t lane = first; lane < std::min(first + lanes_at_once, offsets.size()); ++lane) {
      for (size_t byte = 0; byte < bytes; byte += 4) {
        if (offsets[lane] == kInactive) continue;
        const size_t word = (offsets[lane] + byte) / 4;
        auto& in_bank = words[word % kBanks];
        if (std::find(in_bank.begin(), in_bank.end(), word) == in_bank.end()) in_bank.push_back(word);
      }
    }
    size_t worst = 1;
    for (const auto& in_bank : words) worst = std::max(worst, in_bank.size());
    conflicts += static_cast<int>(worst) - 1;
  }
  return conflicts;
}

void count_load_conflicts_of_block() {
  State& s = state();
  for (const auto& [key, slot] : s.block.loads) {
    s.counters.bank_conflicts_load += conflicts_of(slot.offsets, slot.bytes);
  }
}

void record_load(size_t offset, size_t bytes, const Site& site) {
  Block& b = state().block;
  const int nth = b.load_count[{b.current, site.line(), site.column()}]++;
  LoadSlot& slot = b.loads[{b.current / kWarp, site.line(), site.column(), nth}];
  slot.bytes = bytes;
  slot.offsets[static_cast<size_t>(b.current % kWarp)] = offset;
}

void load_matrices(Rendezvous& meet, bool transposed) {
  State& s = state();
  ++s.counters.matrix_loads;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::vector<size_t> offsets;
    for (int row = 0; row < 8; ++row) {
      offsets.push_back(static_cast<const unsigned char*>(meet.in[matrix * 8 + row]) - s.block.shared);
    }
    s.counters.bank_conflicts_ldmatrix += conflicts_of(offsets, 16);
    for (int lane = 0; lane < kWarp; ++lane) {
      auto* target = reinterpret_cast<unsigned char*>(static_cast<uint32_t*>(meet.out[lane]) + matrix);
      for (int i = 0; i < 2; ++i) {
        const int row = transposed ? lane % 4 * 2 + i : lane / 4;
        const int column = transposed ? lane / 4 : lane % 4 * 2 + i;
        std::memcpy(target + i * 2, s.block.shared + offsets[row] + column * 2, 2);
      }
    }
  }
}

void multiply_matrices(Rendezvous& meet) {
  ++state().counters.multiplies;
  const auto* inputs = reinterpret_cast<const MultiplyInput* const*>(meet.in.data());
  const Matrix kind = inputs[0]->kind;
  const int k_extent = kind == Matrix::kS8S8K16 ? 16 : 32;
  int16_t a[16][32] = {}, b[8][32] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < k_extent / 8; ++r) {
      for (int i = 0; i < 4; ++i) {
        a[lane / 4 + r % 2 * 8][r / 2 * 16 + lane % 4 * 4 + i] =
            static_cast<int8_t>(inputs[lane]->a[r] >> (8 * i));
      }
    }
    for (int r = 0; r < k_extent / 16; ++r) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t byte = inputs[lane]->b[r] >> (8 * i);
        b[lane / 4][r * 16 + lane % 4 * 4 + i] =
            static_cast<int16_t>(kind == Matrix::kS8U8 ? static_cast<int>(byte & 0xFF)
                                                       : static_cast<int>(static_cast<int8_t>(byte)));
      }
    }
  }
  int results[kWarp][4];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int q = 0; q < 4; ++q) {
      const int16_t* row = a[lane / 4 + q / 2 * 8];
      const int16_t* column = b[lane % 4 * 2 + q % 2];
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
      results[lane][q] = checked_add(sum, inputs[lane]->c[q]);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(meet.out[lane], results[lane], sizeof(results[lane]));
}

void shuffle_values(Rendezvous& meet) {
  const auto* inputs = reinterpret_cast<const ShuffleInput* const*>(meet.in.data());
  ShuffleInput values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) values[lane] = *inputs[lane];
  for (int lane = 0; lane < kWarp; ++lane) {
    std::memcpy(meet.out[lane], values[lane ^ values[lane].mask].bytes, values[lane].size);
  }
}

enum Operation { kMatrixLoad = 1, kTransposedLoad, kMatrixMultiply, kShuffle };

void meet_warp(int operation, const void* in, void* out, const Site& site) {
  Block& b = state().block;
  Rendezvous& meet = b.warps[b.current / kWarp];
  const int lane = b.current % kWarp;
  if (meet.arrived > 0 &&
      (meet.operation != operation || meet.line != site.line() || meet.column != site.column())) {
    fail("divergence: lanes of a warp meet at different operations");
  }
  meet.operation = operation;
  meet.line = site.line();
  meet.column = site.column();
  meet.in[lane] = in;
  meet.out[lane] = out;
  const uint64_t generation = meet.generation;
  ++b.progress;
  if (++meet.arrived < kWarp) {
    while (meet.generation == generation) yield_to_scheduler();
    return;
  }
  if (operation == kMatrixLoad) load_matrices(meet, false);
  if (operation == kTransposedLoad) load_matrices(meet, true);
  if (operation == kMatrixMultiply) multiply_matrices(meet);
  if (operation == kShuffle) shuffle_values(meet);
  meet.arrived = 0;
  ++meet.generation;
}

size_t shared_offset(const void* address, size_t bytes) {
  const Block& b = state().block;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(b.shared), at = reinterpret_cast<uintptr_t>(address);
  if (at < begin || at + bytes > begin + b.shared_bytes) fail("shared memory out of bounds");
  if (at % bytes != 0) fail("misaligned access to shared memory");
  return at - begin;
}

void touch(size_t offset, size_t bytes, Access access) {
  Block& b = state().block;
  const int16_t me = static_cast<int16_t>(b.current);
  for (size_t word = offset / 4; word < (offset + bytes + 3) / 4; ++word) {
    Shadow& w = b.shadow[word];
    if (w.pending > 0) fail("shared memory is used while a cp.async still writes it");
    if (w.write_epoch == b.epoch && w.writer != me)
      fail("shared memory race: no barrier since another thread wrote");
    if (access == Access::kWrite) {
      if (w.read_epoch == b.epoch && (w.reader != me || w.shared_read)) {
        fail("shared memory race: no barrier since another thread read");
      }
      w.write_epoch = b.epoch;
      w.writer = me;
      w.written = true;
    } else {
      if (!w.written) fail("shared memory is read before it was written");
      w.shared_read = w.read_epoch == b.epoch && (w.shared_read || w.reader != me);
      w.read_epoch = b.epoch;
      w.reader = me;
    }
  }
}

void finish_copies(Thread& thread, size_t keep) {
  Block& b = state().block;
  while (thread.groups.size() > keep) {
    for (const AsyncCopy& copy : thread.groups.front()) {
      const size_t offset = static_cast<size_t>(copy.smem - b.shared);
      for (size_t word = offset / 4; word < offset / 4 + 4; ++word) --b.shadow[word].pending;
      touch(offset, 16, Access::kWrite);
      if (copy.valid) {
        std::memcpy(copy.smem, copy.gmem, 16);
      } else {
        std::memset(copy.smem, 0, 16);
      }
    }
    thread.groups.erase(thread.groups.begin());
  }
}

}  // namespace

void fail(const char* reason) {
  State& s = state();
  char text[256];
  std::snprintf(text, sizeof(text), "%s (thread %d of block %d, %d)", reason, s.block.current, s.block.x,
                s.block.y);
  s.error = text;
  s.failed = true;
  for (;;) yield_to_scheduler();
}

int current_thread() { return state().block.current; }
int current_block_x() { return state().block.x; }
int current_block_y() { return state().block.y; }
unsigned char* shared_memory() { return state().block.shared; }

bool run_grid(uint32_t grid_x, uint32_t grid_y, uint32_t threads, size_t shared_bytes,
              const std::function<void()>& body) {
  State& s = state();
  if (s.failed || s.launches++ == s.fail_launch) return false;
  for (Range& range : s.ranges) {
    range.writer.assign(range.writable ? range.bytes / 2 + 1 : 0, -1);
    range.reader.assign(range.writable ? range.bytes / 2 + 1 : 0, -1);
  }
  for (uint32_t y = 0; y < grid_y; ++y) {
    for (uint32_t x = 0; x < grid_x; ++x) {
      s.block_index = int64_t{y} * grid_x + x;
      if (!run_block(static_cast<int>(x), static_cast<int>(y), static_cast<int>(threads), shared_bytes, body))
        return false;
    }
  }
  return true;
}

void barrier(const Site& site) {
  State& s = state();
  Block& b = s.block;
  if (b.waiting_at_barrier > 0 && b.barrier_line != site.line())
    fail("divergence: threads wait at different barriers");
  b.barrier_line = site.line();
  const uint64_t generation = b.barrier_generation;
  ++b.progress;
  if (++b.waiting_at_barrier < b.num_threads) {
    while (b.barrier_generation == generation) yield_to_scheduler();
    return;
  }
  b.waiting_at_barrier = 0;
  ++b.barrier_generation;
  ++b.epoch;
  ++s.counters.barriers;
}

void warp_shuffle_xor(void* value, size_t bytes, int mask, const Site& site) {
  ShuffleInput input{{}, bytes, mask};
  std::memcpy(input.bytes, value, bytes);
  meet_warp(kShuffle, &input, value, site);
}

void check_shared(const void* address, size_t bytes, Access access, const Site& site) {
  const size_t offset = shared_offset(address, bytes);
  touch(offset, bytes, access);
  if (state().count_load_conflicts && access == Access::kRead) record_load(offset, bytes, site);
}

void check_global(const void* address, size_t bytes, Access access, bool constant) {
  State& s = state();
  const auto* at = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("misaligned access to global memory");
  for (Range& range : s.ranges) {
    if (at < range.begin || at + bytes > range.begin + range.bytes) continue;
    if (!range.writable) {
      if (access == Access::kWrite)
        fail(("global memory that is only read is written: " + range.name).c_str());
      return;
    }
    const int64_t me = s.block_index * 4096 + s.block.current;
    for (size_t i = (at - range.begin) / 2; i < (at - range.begin + bytes) / 2; ++i) {
      if (range.writer[i] != -1 && (constant || range.writer[i] != me))
        fail("global memory race: another thread wrote it");
      if (access == Access::kWrite) {
        if (range.reader[i] != -1 && range.reader[i] != me)
          fail("global memory race: another thread read it");
        range.writer[i] = me;
      } else {
        range.reader[i] = range.reader[i] == -1 || range.reader[i] == me ? me : -2;
      }
    }
    return;
  }
  fail("global memory out of bounds");
}

void async_copy(void* smem, const void* gmem, bool valid) {
  State& s = state();
  Block& b = s.block;
  const size_t offset = shared_offset(smem, 16);
  if (valid) check_global(gmem, 16, Access::kRead, true);
  touch(offset, 16, Access::kWrite);
  for (size_t word = offset / 4; word < offset / 4 + 4; ++word) ++b.shadow[word].pending;
  std::memset(smem, kPoison, 16);
  b.threads[b.current].open.push_back(
      {static_cast<unsigned char*>(smem), static_cast<const unsigned char*>(gmem), valid});
  ++s.counters.async_copies;
}

void async_commit() {
  Thread& thread = state().block.threads[state().block.current];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void async_wait(int pending) {
  finish_copies(state().block.threads[state().block.current], static_cast<size_t>(pending));
}

void matrix_load(uint32_t* fragment, const void* smem_row, bool transposed, const Site& site) {
  touch(shared_offset(smem_row, 16), 16, Access::kRead);
  meet_warp(transposed ? kTransposedLoad : kMatrixLoad, smem_row, fragment, site);
}

void matrix_multiply(Matrix kind, int* d, const uint32_t* a, const uint32_t* b, const int* c,
                     const Site& site) {
  const MultiplyInput input{kind, a, b, c};
  meet_warp(kMatrixMultiply, &input, d, site);
}

void trace(int row, int column, int group, int sum) {
  State& s = state();
  if (s.trace.empty() || column >= s.trace_columns || group >= s.trace_groups) return;
  const size_t index = (static_cast<size_t>(row) * s.trace_columns + column) * s.trace_groups + group;
  if (index < s.trace.size()) s.trace[index] += sum;
}

}  // namespace fptq::emulation

/* ---- what a test calls ---- */

using fptq::emulation::state;

extern "C" {

/* Forgets ranges, counters, options, the error and the trace; keeps the stacks.
 */
void emulation_reset() {
  auto stacks = std::move(state().stacks);
  state() = {};
  state().stacks = std::move(stacks);
}

/* Global memory that kernels may touch. */
void emulation_add_range(const void* begin, int64_t bytes, int32_t writable, const char* name) {
  state().ranges.push_back(
      {static_cast<const unsigned char*>(begin), static_cast<size_t>(bytes), writable != 0, name, {}, {}});
}

/* Collects trace_group_sum into sums of shape [rows][columns][groups]. */
void emulation_start_trace(int32_t rows, int32_t columns, int32_t groups) {
  state().trace_columns = columns;
  state().trace_groups = groups;
  state().trace.assign(static_cast<size_t>(rows) * columns * groups, 0);
}
const int64_t* emulation_trace() { return state().trace.data(); }

void emulation_set_options(int32_t count_load_conflicts, int32_t reverse_order, int64_t fail_launch) {
  state().count_load_conflicts = count_load_conflicts != 0;
  state().reverse_order = reverse_order != 0;
  state().fail_launch = fail_launch;
}

/* Why the last launch failed; empty when it did not. */
const char* emulation_error() { return state().error.c_str(); }

/* Seven counters in the order of Counters. */
void emulation_counters(int64_t* values) { std::memcpy(values, &state().counters, sizeof(state().counters)); }

}  // extern "C"
