// The TensorRT plugin of a W4A8 linear: IPluginV3 over the kernel boundary (fptq/kernels.h).
//
//   y = FptqW4A8GemmStatic(x, weight_codes, weight_scales, [channel_scales,] x_scale [, bias])
//   y = FptqW4A8GemmPerToken(x, weight_codes, weight_scales [, channel_scales] [, bias])
//
// x FP16 or BF16 [..., K]; y the same type [..., N]. weight_codes INT4 [padded N, padded K] or INT8 [padded
// N, padded K / 2]: opaque bytes in the order of fptq/layout.h. weight_scales FP16 [K / group, padded N];
// two_level: INT8 [K / group, padded N, 2] and channel_scales FP32 [padded N]. x_scale FP32 scalar. bias of
// x's type [N].
//
// Nothing here throws or ends the process: errors are logged and returned.
#ifndef FPTQ_SRC_PLUGIN_H
#define FPTQ_SRC_PLUGIN_H

#include <NvInferRuntime.h>

#include <cstdint>

#include "device_resource.h"
#include "fptq/kernels.h"

namespace fptq {

inline constexpr const char* kPluginNamespace = "fptq";
// Version 1 is the portable node of model.w4a8.onnx, whose weights are in ONNX order and whose function body
// computes it: no plugin has that version, so that such a graph never meets a kernel that expects packed
// weights.
inline constexpr const char* kPluginVersion = "2";
inline constexpr const char* kStaticName = "FptqW4A8GemmStatic";
inline constexpr const char* kPerTokenName = "FptqW4A8GemmPerToken";

// What a node says about its weight; serialized field by field under the names of kFieldNames.
struct PluginParams {
  int32_t layout_version = 0;  // FPTQ_LAYOUT_VERSION
  int32_t scheme = FPTQ_GROUP;
  int32_t group_size = 0;  // 0 is per channel
  int32_t in_features = 0;
  int32_t out_features = 0;
  int32_t has_bias = 0;
};
inline constexpr int32_t kNumFields = 6;

// Reads and checks the fields of a node or of a plan. Logs what is wrong; FPTQ_OK when nothing is.
FptqStatus ParamsFromFields(const char* name, const nvinfer1::PluginFieldCollection* fields,
                            PluginParams* params) noexcept;

class W4A8GemmPlugin final : public nvinfer1::IPluginV3,
                             public nvinfer1::IPluginV3OneCore,
                             public nvinfer1::IPluginV3OneBuild,
                             public nvinfer1::IPluginV3OneRuntime {
 public:
  W4A8GemmPlugin(const PluginParams& params, FptqActivationMode mode) noexcept;
  W4A8GemmPlugin(const W4A8GemmPlugin& other) noexcept;
  W4A8GemmPlugin& operator=(const W4A8GemmPlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                             const nvinfer1::DataType* input_types,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* in_out,
                                 int32_t num_inputs, int32_t num_outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out,
                          int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;
  int32_t getNbTactics() noexcept override;
  int32_t getValidTactics(int32_t* tactics, int32_t num_tactics) noexcept override;
  const char* getTimingCacheID() noexcept override;
  const char* getMetadataString() noexcept override;

  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t num_inputs,
                        const nvinfer1::PluginTensorDesc* out, int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc* output_desc,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  // What an input is for; inputs that a node does not have are left out of the order.
  enum class Role { kX, kWeightCodes, kWeightScales, kChannelScales, kXScale, kBias, kY };

  int32_t NumInputs() const noexcept;
  Role RoleOf(int32_t position) const noexcept;
  bool TypeFits(Role role, nvinfer1::DataType type, nvinfer1::DataType x_type) const noexcept;
  // Whether the dimensions of an input are those of its role; -1 stands for any size.
  bool ShapeFits(Role role, const nvinfer1::Dims& dims, nvinfer1::DataType type) const noexcept;
  // Logs what is wrong with an input; FPTQ_OK when nothing is.
  FptqStatus CheckInput(int32_t position, const nvinfer1::PluginTensorDesc& tensor,
                        nvinfer1::DataType x_type) const noexcept;
  // Product of all dimensions but the last; 0 where one is unknown or the product does not fit.
  static int32_t RowsOf(const nvinfer1::Dims& dims) noexcept;
  // Rows of the largest x of a profile, 0 as for RowsOf.
  static int32_t LargestRows(const nvinfer1::DynamicPluginTensorDesc& x) noexcept;
  // The pointers of the inputs; y and workspace are null.
  FptqGemmArgs ArgsFromInputs(const void* const* inputs) const noexcept;
  W4A8GemmPlugin* Copy() const noexcept;
  FptqStatus Prepare(const nvinfer1::PluginTensorDesc& x) noexcept;
  FptqGemmDesc DescFor(int32_t m, nvinfer1::DataType type) const noexcept;
  void PointToOwnFields() noexcept;

  PluginParams params_;
  FptqActivationMode mode_;
  FptqGemmDesc desc_{};      // of configurePlugin (optimal m) or of the last onShapeChange
  FptqGemmConfig config_{};  // of desc_, where prepared_
  size_t workspace_bytes_ = 0;
  int32_t tactic_ = 0;
  bool prepared_ = false;
  SharedDevices devices_;  // held by the copy that runs in a context, and by no other
  char text_[96]{};  // timing-cache id and metadata
  nvinfer1::PluginField fields_[kNumFields];
  nvinfer1::PluginFieldCollection collection_{};
};

class W4A8GemmCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit W4A8GemmCreator(FptqActivationMode mode) noexcept;

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  FptqActivationMode mode_;
  nvinfer1::PluginField fields_[kNumFields];
  nvinfer1::PluginFieldCollection collection_{};
};

// The creators of this library, one an activation mode; they live as long as it is loaded.
nvinfer1::IPluginCreatorInterface* const* Creators(int32_t* count) noexcept;

}  // namespace fptq

#endif  // FPTQ_SRC_PLUGIN_H
