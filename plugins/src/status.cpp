#include "fptq/status.h"

const char* fptqStatusMessage(FptqStatus status) {
  switch (status) {
    case FPTQ_OK:
      return "no error";
    case FPTQ_NULL_POINTER:
      return "a required pointer is null";
    case FPTQ_BAD_SHAPE:
      return "a size is not positive, N is not a multiple of 8, K is not a multiple of the group size, or K "
             "is above 65536";
    case FPTQ_BAD_GROUP_SIZE:
      return "the group size is not one of 128, 64, 32, 16, or does not fit the scheme (0 is per channel)";
    case FPTQ_BAD_ALIGNMENT:
      return "a pointer is not aligned to 16 bytes";
    case FPTQ_BAD_CONFIG:
      return "the configuration was not made for this problem";
    case FPTQ_SMALL_WORKSPACE:
      return "the workspace is smaller than fptqWorkspaceBytes asks for";
    case FPTQ_UNSUPPORTED_DEVICE:
      return "the device is older than compute capability 8.0";
    case FPTQ_CUDA_ERROR:
      return "a CUDA call failed";
  }
  return "unknown status";
}
