#include "fptq_run/sampling.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

// Constants of numpy.random.SeedSequence (after M. O'Neill's seed_seq_fe).
constexpr std::uint32_t kInitA = 0x43b0d7e5;
constexpr std::uint32_t kMultA = 0x931e8875;
constexpr std::uint32_t kInitB = 0x8b51f9dd;
constexpr std::uint32_t kMultB = 0x58f38ded;
constexpr std::uint32_t kMixLeft = 0xca01f9dd;
constexpr std::uint32_t kMixRight = 0x4973f715;
constexpr std::uint32_t kShift = 16;
constexpr std::size_t kPool = 4;

std::uint32_t Hash(std::uint32_t value, std::uint32_t& constant, std::uint32_t multiplier) {
  value ^= constant;
  constant *= multiplier;
  value *= constant;
  return value ^ (value >> kShift);
}

std::uint32_t Mix(std::uint32_t left, std::uint32_t right) {
  const std::uint32_t mixed = (kMixLeft * left) - (kMixRight * right);
  return mixed ^ (mixed >> kShift);
}

// SeedSequence(seed).generate_state(4, uint64)
std::array<std::uint64_t, 4> SeedState(std::uint64_t seed) {
  std::array<std::uint32_t, kPool> pool{static_cast<std::uint32_t>(seed),
                                        static_cast<std::uint32_t>(seed >> 32U)};
  std::uint32_t constant = kInitA;
  for (std::uint32_t& word : pool) word = Hash(word, constant, kMultA);
  for (std::size_t from = 0; from < kPool; ++from) {
    for (std::size_t to = 0; to < kPool; ++to) {
      if (from != to) pool[to] = Mix(pool[to], Hash(pool[from], constant, kMultA));
    }
  }
  std::array<std::uint64_t, 4> state{};
  constant = kInitB;
  for (std::size_t word = 0; word < 2 * state.size(); ++word) {
    const std::uint64_t bits = Hash(pool[word % kPool], constant, kMultB);
    state[word / 2] |= bits << (32 * (word % 2));
  }
  return state;
}

struct Candidate {
  double logit;
  std::int64_t id;
};

bool IsBefore(const Candidate& one, const Candidate& other) {
  return one.logit != other.logit ? one.logit > other.logit : one.id < other.id;
}

std::vector<Candidate> SortedCandidates(const std::vector<float>& logits, const Sampling& sampling) {
  std::vector<Candidate> candidates(logits.size());
  for (std::size_t id = 0; id < logits.size(); ++id) {
    candidates[id] = {static_cast<double>(logits[id]) / sampling.temperature, static_cast<std::int64_t>(id)};
  }
  const std::size_t kept = sampling.top_k == 0
                               ? candidates.size()
                               : std::min(candidates.size(), static_cast<std::size_t>(sampling.top_k));
  std::partial_sort(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(kept),
                    candidates.end(), IsBefore);
  candidates.resize(kept);
  return candidates;
}

// Running sums of the softmax.
std::vector<double> RunningSums(const std::vector<Candidate>& candidates) {
  std::vector<double> sums(candidates.size());
  std::transform(candidates.begin(), candidates.end(), sums.begin(), [&](const Candidate& candidate) {
    return std::exp(candidate.logit - candidates.front().logit);
  });
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  double running = 0.0;
  for (double& sum : sums) sum = running += sum / total;
  return sums;
}

}  // namespace

void CheckSampling(const Sampling& sampling) {
  if (!(sampling.temperature >= 0.0) || std::isinf(sampling.temperature)) {
    throw Error("--temperature", "is not a number from 0 on");
  }
  if (sampling.top_k < 0) throw Error("--top-k", "is below 0", "give 0 to keep every token");
  if (std::isnan(sampling.top_p) || sampling.top_p <= 0.0 || sampling.top_p > 1.0)
    throw Error("--top-p", "is not above 0 and at most 1");
}

NumpyRandom::NumpyRandom(std::uint64_t seed) {
  const std::array<std::uint64_t, 4> words = SeedState(seed);
  const UInt128 start = (static_cast<UInt128>(words[0]) << 64U) | words[1];
  const UInt128 sequence = (static_cast<UInt128>(words[2]) << 64U) | words[3];
  state_ = 0;
  increment_ = (sequence << 1U) | 1U;
  NextBits();
  state_ += start;
  NextBits();
}

std::uint64_t NumpyRandom::NextBits() {
  constexpr UInt128 kMultiplier =
      (static_cast<UInt128>(2549297995355413924ULL) << 64U) | 4865540595714422341ULL;
  state_ = (state_ * kMultiplier) + increment_;
  const auto folded = static_cast<std::uint64_t>(state_ >> 64U) ^ static_cast<std::uint64_t>(state_);
  return std::rotr(folded, static_cast<int>(state_ >> 122U));
}

double NumpyRandom::Random() { return static_cast<double>(NextBits() >> 11U) * 0x1p-53; }

std::int64_t Sampler::Next(const std::vector<float>& logits) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (largest == logits.end() || !std::isfinite(*largest) ||
      std::any_of(logits.begin(), logits.end(), [](float logit) { return std::isnan(logit); })) {
    throw Error("logits", "are NaN or infinite", "verify the run: fptq-export verify DIR");
  }
  if (sampling_.temperature == 0.0) return largest - logits.begin();
  const std::vector<Candidate> candidates = SortedCandidates(logits, sampling_);
  std::vector<double> sums = RunningSums(candidates);
  const auto enough = std::lower_bound(sums.begin(), sums.end(), sampling_.top_p);
  if (enough != sums.end()) sums.erase(enough + 1, sums.end());
  const double drawn = random_.Random() * sums.back();
  const auto chosen = std::upper_bound(sums.begin(), sums.end(), drawn);
  const auto last = static_cast<std::ptrdiff_t>(sums.size()) - 1;
  return candidates[static_cast<std::size_t>(std::min(chosen - sums.begin(), last))].id;
}

}  // namespace fptq_run
