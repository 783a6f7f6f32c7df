/* Choosing how to run a problem: pure host code, the same answer for the same arguments. */
#ifndef FPTQ_SRC_CONFIG_H
#define FPTQ_SRC_CONFIG_H

#include "fptq/kernels.h"

namespace fptq {

/* FPTQ_OK, or what is wrong with the problem itself. */
FptqStatus check_desc(const FptqGemmDesc& desc);
FptqStatus check_device(const FptqDevice& device);

/* Why the configuration cannot run this problem on any device; null when it can. */
const char* config_error(const FptqGemmDesc& desc, const FptqGemmConfig& config);

}  // namespace fptq

#endif  // FPTQ_SRC_CONFIG_H
