// The packer of weights, on the host. C linkage, so that tests and other tools can call it.
#ifndef FPTQ_SRC_PACKING_H
#define FPTQ_SRC_PACKING_H

#include <cstddef>
#include <cstdint>

#include "fptq/layout.h"
#include "fptq/status.h"

#define FPTQ_PACKING_EXPORT __attribute__((visibility("default")))

extern "C" {

// codes: INT8 in [-8, 7], row-major [n, k]. packed: FPTQ_PACKED_BYTES(n, k) bytes. FPTQ_BAD_CONFIG: a code
// does not fit.
FPTQ_PACKING_EXPORT FptqStatus fptqPackTiles(const int8_t* codes, int32_t n, int32_t k, uint8_t* packed);

// The inverse; padding is dropped.
FPTQ_PACKING_EXPORT FptqStatus fptqUnpackTiles(const uint8_t* packed, int32_t n, int32_t k, int8_t* codes);

// scales: FP16 bits, row-major [n, groups]. packed: FP16 bits [groups][padded n], padding zero.
FPTQ_PACKING_EXPORT FptqStatus fptqPackScales(const uint16_t* scales, int32_t n, int32_t groups,
                                              uint16_t* packed);

}  // extern "C"

#endif  // FPTQ_SRC_PACKING_H
