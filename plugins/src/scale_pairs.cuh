/* two_level scale pairs of a warp, from shared memory to registers. */
#ifndef FPTQ_SRC_SCALE_PAIRS_CUH
#define FPTQ_SRC_SCALE_PAIRS_CUH

#include "ptx_ops.h"
#include "scheme.cuh"

namespace fptq {

/*
 * The pairs of one k tile (or of the group that spans it), for the channels of kFragmentsN B fragments.
 *
 * The 16 bytes of 8 channels in one group are a row of an 8 x 8 matrix of 16-bit elements. Transposed,
 * ldmatrix gives lane l column l / 4, which is the channel whose weights the lane holds, of two rows in each
 * register. All even rows name one fragment and group, all odd rows another, so one instruction loads eight
 * pairs.
 */
template <class S, int kFragmentsN>
class ScalePairs {
 public:
  /* Bytes from a stage of scales, 16 bits [group of the k tile][row_channels], to the matrix row whose address
   * this lane gives. */
  __device__ static int lane_offset(int lane, int row_channels, int first_channel) {
    const int number = (lane / 8 * 2 + lane % 2) % kPairs;
    return (number / kFragmentsN * row_channels + first_channel + number % kFragmentsN * 8) * 2;
  }
  __device__ void load(const unsigned char* smem_lane, int row_channels) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      ldmatrix_x4_trans(words_[i], smem_lane + i * (kPairsPerLoad / kFragmentsN) * row_channels * 2);
  }
  /* The pair of this lane's channel in B fragment j. */
  __device__ TwoLevelScale scale(int group_of_tile, int j) const {
    const int number = group_of_tile * kFragmentsN + j;
    const uint32_t word = words_[number / kPairsPerLoad][number % kPairsPerLoad / 2];
    return number % 2 == 0 ? two_level_from_pair<0>(word) : two_level_from_pair<1>(word);
  }

 private:
  static constexpr int kPairsPerLoad = 8;
  static constexpr int kPairs = S::kGroupsPerTile * kFragmentsN;
  static constexpr int kLoads = (kPairs + kPairsPerLoad - 1) / kPairsPerLoad;
  static_assert(kPairsPerLoad % kFragmentsN == 0, "a load holds whole groups");

  uint32_t words_[kLoads][4];
};

}  // namespace fptq

#endif  // FPTQ_SRC_SCALE_PAIRS_CUH
