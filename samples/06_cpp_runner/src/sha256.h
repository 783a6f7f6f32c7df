// SHA-256 (FIPS 180-4).
#ifndef FPTQ_RUN_SRC_SHA256_H
#define FPTQ_RUN_SRC_SHA256_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace fptq_run {

class Sha256 {
 public:
  void Update(const unsigned char* data, std::size_t bytes);
  // 64 hexadecimal digits. Ends the sum.
  std::string Digest();

 private:
  void Block(const unsigned char* block);

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> rest_{};
  std::uint64_t bytes_ = 0;
};

// Of a file; empty where it cannot be read.
std::string Sha256FromFile(const std::string& path);

}  // namespace fptq_run

#endif  // FPTQ_RUN_SRC_SHA256_H
