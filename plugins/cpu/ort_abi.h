/*
 * The part of ONNX Runtime's C interface that a library of custom operators needs, declared by its binary layout.
 *
 * ONNX Runtime's Python package carries no header. Its interface is a table of function pointers that only ever grows:
 * a function keeps its place in all later versions, so the places below hold from version 18 (KernelContext_ParallelFor)
 * on. `GetApi(18)` gives no table where the running library is older, and registration then fails with a message.
 */
#ifndef FPTQ_CPU_ORT_ABI_H
#define FPTQ_CPU_ORT_ABI_H

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

// The table; every entry is a function pointer.
using OrtFunction = void (*)();
struct OrtApi {
  OrtFunction functions[1];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Fields up to version 16; `version` tells ONNX Runtime to read no further.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
};

}  // extern "C"

namespace fptq::ort {

inline constexpr uint32_t kApiVersion = 18;
inline constexpr uint32_t kCustomOpVersion = 16;

// ONNX element types.
inline constexpr int kFloat = 1, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kInt4 = 22;
inline constexpr int kRequired = 0, kOptional = 1;  // of an input or output
inline constexpr int kDefaultMemory = 0;
inline constexpr int kFail = 1;  // error code

// The functions, each by its place in the table.
class Api {
 public:
  explicit Api(const OrtApi* table) : functions_(table->functions) {}

  OrtStatus* create_status(const char* message) const {
    return at<OrtStatus*(int, const char*)>(0)(kFail, message);
  }
  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** domain) const {
    return at<OrtStatus*(const char*, OrtCustomOpDomain**)>(26)(name, domain);
  }
  OrtStatus* add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return at<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return at<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* mutable_data(OrtValue* value, void** data) const {
    return at<OrtStatus*(OrtValue*, void**)>(51)(value, data);
  }
  OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, int* type) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>(60)(info, type);
  }
  OrtStatus* rank(const OrtTensorTypeAndShapeInfo* info, size_t* rank) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, rank);
  }
  OrtStatus* dimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t rank) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, dims, rank);
  }
  OrtStatus* type_and_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) const {
    return at<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, info);
  }
  OrtStatus* float_attribute(const OrtKernelInfo* info, const char* name, float* value) const {
    return at<OrtStatus*(const OrtKernelInfo*, const char*, float*)>(85)(info, name, value);
  }
  OrtStatus* int_attribute(const OrtKernelInfo* info, const char* name, int64_t* value) const {
    return at<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }
  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** value) const {
    return at<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, value);
  }
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank,
                    OrtValue** value) const {
    return at<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(
        context, index, dims, rank, value);
  }
  void release(OrtTensorTypeAndShapeInfo* info) const { at<void(OrtTensorTypeAndShapeInfo*)>(99)(info); }
  OrtStatus* input_count(const OrtKernelInfo* info, size_t* count) const {
    return at<OrtStatus*(const OrtKernelInfo*, size_t*)>(230)(info, count);
  }
  OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* is_constant,
                            const OrtValue** value) const {
    return at<OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(249)(info, index, is_constant,
                                                                                     value);
  }
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*work)(void*, size_t), size_t count,
                          void* data) const {
    constexpr size_t kOneTaskEach = 0;
    return at<OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, work, count, kOneTaskEach, data);
  }

 private:
  template <typename Signature>
  Signature* at(size_t place) const {
    return reinterpret_cast<Signature*>(functions_[place]);
  }
  const OrtFunction* functions_;
};

}  // namespace fptq::ort

#endif  // FPTQ_CPU_ORT_ABI_H
