// Memory of weights, which a token reads once from end to end.
#ifndef FPTQ_CPU_WEIGHT_MEMORY_H
#define FPTQ_CPU_WEIGHT_MEMORY_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "fptq/layout.h"
#include "w4a8_cpu.h"

namespace fptq::cpu {

// `size` bytes on a cache line, in pages of 2 MiB where the system has them: what a processor fetches ahead ends with a
// page, and so do its address translations. Weights share chunks, which are freed with the last weight in them.
inline std::shared_ptr<uint8_t> weight_memory(size_t size) {
  constexpr size_t kHugePage = size_t{2} << 20, kChunk = 8 * kHugePage;
  struct Chunk {
    uint8_t* bytes;
    size_t size, used = 0;
    explicit Chunk(size_t wanted)
        : bytes(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, wanted))), size(wanted) {
      if (bytes == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      madvise(bytes, size, MADV_HUGEPAGE);  // a wish: small pages do as well
#endif
    }
    Chunk(const Chunk&) = delete;
    ~Chunk() { std::free(bytes); }
  };
  static std::mutex mutex;
  static std::weak_ptr<Chunk> last;
  const size_t needed = FPTQ_ROUND_UP(std::max(size, size_t{1}), size_t{FPTQ_CPU_ALIGNMENT});
  const std::scoped_lock lock(mutex);
  std::shared_ptr<Chunk> chunk = last.lock();
  if (chunk == nullptr || chunk->size - chunk->used < needed) {
    chunk = std::make_shared<Chunk>(std::max(kChunk, FPTQ_ROUND_UP(needed, kHugePage)));
    last = chunk;
  }
  uint8_t* begin = chunk->bytes + chunk->used;
  chunk->used += needed;
  return {std::move(chunk), begin};
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_WEIGHT_MEMORY_H
