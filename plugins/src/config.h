/* Choosing how to run a problem: pure host code, the same answer for the same arguments. */
#ifndef FPTQ_SRC_CONFIG_H
#define FPTQ_SRC_CONFIG_H

#include <string>
#include <vector>

#include "fptq/kernels.h"

namespace fptq {

/* A configuration that was thought of: either it has a modelled time, or a reason why it cannot be used. */
struct Candidate {
  FptqGemmConfig config;
  double microseconds;   /* modelled; for ordering only */
  const char* rejection; /* null: usable */
};

/* FPTQ_OK, or what is wrong with the problem itself. */
FptqStatus check_desc(const FptqGemmDesc& desc);
FptqStatus check_device(const FptqDevice& device);

/* Why the configuration cannot run this problem on any device; null when it can. */
const char* config_error(const FptqGemmDesc& desc, const FptqGemmConfig& config);

/* Every candidate: usable ones first, best first, then the rejected. */
std::vector<Candidate> rank_candidates(const FptqGemmDesc& desc, const FptqDevice& device);

/* One line: kernel, tiles, stages, split. */
std::string config_text(const FptqGemmConfig& config);

}  // namespace fptq

#endif  // FPTQ_SRC_CONFIG_H
