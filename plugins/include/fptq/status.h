/* Status codes of every function of the kernel boundary. Mirrored in fptq_export/plugin/status.py; a test compares them. */
#ifndef FPTQ_STATUS_H
#define FPTQ_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum FptqStatus {
  FPTQ_OK = 0,
  FPTQ_NULL_POINTER = 1,    /* a required pointer is null */
  FPTQ_BAD_SHAPE = 2,       /* a size is not positive, N is not a multiple of 8, or K is not one of the group size */
  FPTQ_BAD_GROUP_SIZE = 3,  /* the group size is not one of FPTQ_GROUP_SIZES, and not 0 (per channel) */
  FPTQ_BAD_ALIGNMENT = 4,   /* a pointer is not aligned to FPTQ_POINTER_ALIGNMENT bytes */
  FPTQ_BAD_CONFIG = 5,      /* the configuration was not made for this problem */
  FPTQ_SMALL_WORKSPACE = 6, /* fewer workspace bytes than fptqWorkspaceBytes asks for */
  FPTQ_UNSUPPORTED_DEVICE = 7, /* the device is older than compute capability 8.0 */
  FPTQ_CUDA_ERROR = 8       /* a CUDA call failed; the sticky error is left for the caller to read */
} FptqStatus;

/* One sentence for a status, never null. */
const char* fptqStatusMessage(FptqStatus status);

#ifdef __cplusplus
}
#endif
#endif /* FPTQ_STATUS_H */
