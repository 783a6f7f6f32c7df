/* Small kernels that each break one rule, and one that breaks none: what the emulator's checks are tested with. */
#include <iterator>

#include "launch.h"

namespace fptq {
namespace {

struct Params {
  unsigned char* input;  /* 1024 bytes, only read */
  unsigned char* output; /* 1024 bytes */
};

constexpr uint32_t kThreads = 64;
constexpr size_t kSharedBytes = 1024;

unsigned char* word_of(int thread) { return dynamic_shared() + thread * 4; }

__global__ void correct(const Params p) {
  const int thread = thread_id();
  cp_async_16(dynamic_shared() + thread * 16, p.input + thread * 16, true);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  const uint32_t word = load_shared<uint32_t>(word_of(thread ^ 32));
  store_global<uint32_t>(p.output + thread * 4, shuffle_xor(word, 1));
}

__global__ void race_of_write_and_read(const Params) {
  store_shared<int>(word_of(thread_id()), 1);
  sync_block();
  store_shared<int>(word_of(thread_id()), 2);
  load_shared<int>(word_of(thread_id() ^ 32));
}

__global__ void race_of_writes(const Params) { store_shared<int>(word_of(thread_id() / 2), 1); }

__global__ void read_before_write(const Params) { load_shared<int>(word_of(thread_id())); }

__global__ void shared_out_of_bounds(const Params) { store_shared<int>(word_of(thread_id() + 256), 1); }

__global__ void global_out_of_bounds(const Params p) {
  load_global<int>(p.input + 1024 - 252 + thread_id() * 4); /* the last thread */
}

__global__ void write_of_the_input(const Params p) { store_global<int>(p.input + thread_id() * 4, 1); }

__global__ void misaligned(const Params p) { load_global<uint4>(p.input + thread_id() * 8); }

__global__ void global_race(const Params p) { store_global<int>(p.output + thread_id() / 2 * 4, 1); }

__global__ void different_barriers(const Params) {
  if (thread_id() < 32) {
    sync_block();
  } else {
    sync_block();
  }
}

__global__ void barrier_of_half_the_threads(const Params) {
  if (thread_id() < 32) sync_block();
}

__global__ void different_shuffles(const Params) {
  if (thread_id() % 2 == 0) {
    shuffle_xor(1, 1);
  } else {
    shuffle_xor(1, 1);
  }
}

__global__ void early_read(const Params p) {
  unsigned char* smem = dynamic_shared() + thread_id() * 16;
  cp_async_16(smem, p.input + thread_id() * 16, true);
  cp_async_commit();
  cp_async_wait<1>();
  load_shared<int>(smem);
}

__global__ void forgotten_commit(const Params p) {
  cp_async_16(dynamic_shared() + thread_id() * 16, p.input + thread_id() * 16, true);
  cp_async_wait<0>();
}

__global__ void forgotten_wait(const Params p) {
  cp_async_16(dynamic_shared() + thread_id() * 16, p.input + thread_id() * 16, true);
  cp_async_commit();
}

__global__ void overflow(const Params) { dp4a_s8_s8(0x7F7F7F7Fu, 0x7F7F7F7Fu, INT32_MAX); }

struct Check {
  const char* name;
  void (*kernel)(Params);
};

#define CHECK(kernel) {#kernel, kernel}
const Check kChecks[] = {
    CHECK(correct),
    CHECK(race_of_write_and_read),
    CHECK(race_of_writes),
    CHECK(read_before_write),
    CHECK(shared_out_of_bounds),
    CHECK(global_out_of_bounds),
    CHECK(write_of_the_input),
    CHECK(misaligned),
    CHECK(global_race),
    CHECK(different_barriers),
    CHECK(barrier_of_half_the_threads),
    CHECK(different_shuffles),
    CHECK(early_read),
    CHECK(forgotten_commit),
    CHECK(forgotten_wait),
    CHECK(overflow),
};
#undef CHECK

}  // namespace
}  // namespace fptq

extern "C" {

/* Name of the kernel of this number, or null past the last one. */
const char* check_name(int number) {
  return number < static_cast<int>(std::size(fptq::kChecks)) ? fptq::kChecks[number].name : nullptr;
}

int check_run(int number, unsigned char* input, unsigned char* output) {
  return fptq::launch(fptq::kChecks[number].kernel, 1, 1, fptq::kThreads, fptq::kSharedBytes, nullptr,
                      fptq::Params{input, output});
}

}  // extern "C"
