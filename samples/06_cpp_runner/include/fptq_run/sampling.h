// Choosing the next token.
//
// temperature 0: the largest logit, of equal ones that with the lowest id. Else, in float64:
//   1. logits / temperature, sorted from the largest, equal ones by id;
//   2. top_k > 0 keeps that many;
//   3. softmax over what is kept;
//   4. top_p keeps the shortest head whose probabilities add up to top_p or more;
//   5. u = random() x (sum of the kept); the first token whose running sum is above u.
// random() is NumPy's: numpy.random.default_rng(seed).random(), number by number. So the tokens are those of
// `chosen_token` in fptq_export/runtime/sampling.py, which fptq_export.runtime.Session draws with.
#ifndef FPTQ_RUN_SAMPLING_H
#define FPTQ_RUN_SAMPLING_H

#include <cstdint>
#include <vector>

namespace fptq_run {

struct Sampling {
  double temperature = 0.0;  // 0 is greedy
  std::int64_t top_k = 0;    // 0 keeps all
  double top_p = 1.0;
  std::uint64_t seed = 0;
};

// Throws Error where a value is out of its range.
void CheckSampling(const Sampling& sampling);

// numpy.random.default_rng(seed): PCG64 (PCG XSL RR 128/64, M. O'Neill 2014), seeded through SeedSequence.
class NumpyRandom {
 public:
  explicit NumpyRandom(std::uint64_t seed);
  std::uint64_t NextBits();
  // Uniform in [0, 1), in steps of 2^-53.
  double Random();

 private:
  __extension__ using UInt128 = unsigned __int128;
  UInt128 state_;
  UInt128 increment_;
};

// The tokens of one sequence.
class Sampler {
 public:
  // `row` is the sequence's number in its batch: sequence i is drawn with seed + i.
  Sampler(const Sampling& sampling, std::uint64_t row) : sampling_(sampling), random_(sampling.seed + row) {}
  // Throws Error where a logit is NaN or none is finite.
  std::int64_t Next(const std::vector<float>& logits);

 private:
  Sampling sampling_;
  NumpyRandom random_;
};

}  // namespace fptq_run

#endif  // FPTQ_RUN_SAMPLING_H
