#include "plugin.h"

#include <cstdio>
#include <cstring>
#include <new>

#include "device.h"
#include "log.h"
#include "registry_abi.h"
#include "tactics.h"

namespace fptq {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

int32_t Report(const char* name, const char* method, FptqStatus status) noexcept {
  if (status != FPTQ_OK) LogError("%s::%s: %s (status %d)", name, method, fptqStatusMessage(status), status);
  return status;
}

}  // namespace

W4A8GemmPlugin::W4A8GemmPlugin(const PluginParams& params, FptqActivationMode mode) noexcept
    : params_(params), mode_(mode) {
  std::snprintf(text_, sizeof(text_), "%s v%s layout %d scheme %d group %d bias %d", getPluginName(),
                kPluginVersion, params_.layout_version, params_.scheme, params_.group_size, params_.has_bias);
  PointToOwnFields();
}

W4A8GemmPlugin::W4A8GemmPlugin(const W4A8GemmPlugin& other) noexcept
    : W4A8GemmPlugin(other.params_, other.mode_) {
  desc_ = other.desc_;
  config_ = other.config_;
  workspace_bytes_ = other.workspace_bytes_;
  tactic_ = other.tactic_;
  prepared_ = other.prepared_;
}

nvinfer1::IPluginCapability* W4A8GemmPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

W4A8GemmPlugin* W4A8GemmPlugin::Copy() const noexcept {
  auto* copy = new (std::nothrow) W4A8GemmPlugin(*this);
  if (copy == nullptr) LogError("%s: out of memory", getPluginName());
  return copy;
}

nvinfer1::IPluginV3* W4A8GemmPlugin::clone() noexcept { return Copy(); }

const char* W4A8GemmPlugin::getPluginName() const noexcept {
  return mode_ == FPTQ_STATIC ? kStaticName : kPerTokenName;
}

const char* W4A8GemmPlugin::getPluginVersion() const noexcept { return kPluginVersion; }

const char* W4A8GemmPlugin::getPluginNamespace() const noexcept { return kPluginNamespace; }

// ---- Build ----

int32_t W4A8GemmPlugin::getNbOutputs() const noexcept { return 1; }

int32_t W4A8GemmPlugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs,
                                           const DataType* input_types, int32_t num_inputs) const noexcept {
  if (output_types == nullptr || input_types == nullptr)
    return Report(getPluginName(), __func__, FPTQ_NULL_POINTER);
  if (num_outputs != 1 || num_inputs != NumInputs()) return Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
  for (int32_t i = 0; i < num_inputs; ++i) {
    if (TypeFits(RoleOf(i), input_types[i], input_types[0])) continue;
    LogError("%s: input %d has data type %d", getPluginName(), i, static_cast<int>(input_types[i]));
    return FPTQ_BAD_CONFIG;
  }
  output_types[0] = input_types[0];
  return FPTQ_OK;
}

int32_t W4A8GemmPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                                        const nvinfer1::DimsExprs* /*shape_inputs*/,
                                        int32_t /*num_shape_inputs*/, nvinfer1::DimsExprs* outputs,
                                        int32_t num_outputs, nvinfer1::IExprBuilder& builder) noexcept {
  if (inputs == nullptr || outputs == nullptr) return Report(getPluginName(), __func__, FPTQ_NULL_POINTER);
  if (num_inputs != NumInputs() || num_outputs != 1 || inputs[0].nbDims < 1) {
    return Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
  }
  const int32_t last = inputs[0].nbDims - 1;
  const nvinfer1::IDimensionExpr* k = inputs[0].d[last];
  if (k == nullptr || (k->isConstant() && k->getConstantValue() != params_.in_features)) {
    return Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
  }
  outputs[0] = inputs[0];
  outputs[0].d[last] = builder.constant(params_.out_features);
  return outputs[0].d[last] != nullptr ? FPTQ_OK : Report(getPluginName(), __func__, FPTQ_NULL_POINTER);
}

bool W4A8GemmPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* in_out,
                                               int32_t num_inputs, int32_t num_outputs) noexcept {
  if (in_out == nullptr || num_inputs != NumInputs() || num_outputs != 1 || position < 0 ||
      position > num_inputs) {
    return false;
  }
  const PluginTensorDesc& tensor = in_out[position].desc;
  return tensor.format == TensorFormat::kLINEAR &&
         TypeFits(RoleOf(position), tensor.type, in_out[0].desc.type);
}

int32_t W4A8GemmPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_inputs,
                                        const DynamicPluginTensorDesc* out, int32_t num_outputs) noexcept {
  if (in == nullptr || out == nullptr) return Report(getPluginName(), __func__, FPTQ_NULL_POINTER);
  if (num_outputs != 1 || num_inputs != NumInputs()) {
    return Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
  }
  for (int32_t i = 0; i < num_inputs; ++i) {
    const FptqStatus status = CheckInput(i, in[i].desc, in[0].desc.type);
    if (status != FPTQ_OK) return Report(getPluginName(), __func__, status);
  }
  // Tactics are timed at the optimal shape; the workspace is for the largest, so that must fit too.
  const int32_t largest = LargestRows(in[0]);
  const int32_t m = RowsOf(in[0].opt.nbDims > 0 ? in[0].opt : in[0].desc.dims);
  desc_ = DescFor(m > 0 ? m : largest, in[0].desc.type);
  prepared_ = false;
  return largest > 0 ? FPTQ_OK : Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
}

size_t W4A8GemmPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                        const DynamicPluginTensorDesc* /*outputs*/,
                                        int32_t /*num_outputs*/) const noexcept {
  if (inputs == nullptr || num_inputs < 1) return 0;
  const int32_t m = LargestRows(inputs[0]);
  return m > 0 ? WorkspaceBound(DescFor(m, inputs[0].desc.type)) : 0;
}

int32_t W4A8GemmPlugin::getNbTactics() noexcept {
  int32_t tactics[kMaxTactics];
  FptqDevice device;
  // Without a GPU nothing can be timed: the default tactic chooses when the engine runs.
  return CurrentDevice(&device) == FPTQ_OK ? TacticsForProblem(desc_, device, tactics) : 0;
}

int32_t W4A8GemmPlugin::getValidTactics(int32_t* tactics, int32_t num_tactics) noexcept {
  if (num_tactics == 0) return FPTQ_OK;
  if (tactics == nullptr) return Report(getPluginName(), __func__, FPTQ_NULL_POINTER);
  int32_t valid[kMaxTactics];
  FptqDevice device;
  const FptqStatus status = CurrentDevice(&device);
  if (status != FPTQ_OK) return Report(getPluginName(), __func__, status);
  if (TacticsForProblem(desc_, device, valid) != num_tactics)
    return Report(getPluginName(), __func__, FPTQ_BAD_CONFIG);
  std::memcpy(tactics, valid, sizeof(int32_t) * static_cast<size_t>(num_tactics));
  return FPTQ_OK;
}

// TensorRT adds the shapes, types and formats of inputs and outputs itself.
const char* W4A8GemmPlugin::getTimingCacheID() noexcept { return text_; }

const char* W4A8GemmPlugin::getMetadataString() noexcept { return text_; }

// ---- Run ----

int32_t W4A8GemmPlugin::setTactic(int32_t tactic) noexcept {
  if (tactic < 0) return Report(getPluginName(), __func__, FPTQ_BAD_CONFIG);
  tactic_ = tactic;
  prepared_ = false;
  return FPTQ_OK;
}

FptqStatus W4A8GemmPlugin::Prepare(const PluginTensorDesc& x) noexcept {
  const FptqGemmDesc desc = DescFor(RowsOf(x.dims), x.type);
  if (prepared_ && desc.m == desc_.m && desc.output_type == desc_.output_type) return FPTQ_OK;
  prepared_ = false;
  if (desc.m <= 0) return FPTQ_BAD_SHAPE;
  FptqDevice device;
  FptqStatus status = devices_.Current(&device);
  if (status != FPTQ_OK) return status;
  status = ConfigForCall(desc, device, tactic_, &config_);
  if (status != FPTQ_OK) return status;
  desc_ = desc;
  workspace_bytes_ = fptqWorkspaceBytes(&desc_, &config_);
  prepared_ = true;
  return FPTQ_OK;
}

int32_t W4A8GemmPlugin::onShapeChange(const PluginTensorDesc* in, int32_t num_inputs,
                                      const PluginTensorDesc* out, int32_t num_outputs) noexcept {
  if (in == nullptr || out == nullptr) return Report(getPluginName(), __func__, FPTQ_NULL_POINTER);
  if (num_outputs != 1 || num_inputs != NumInputs()) {
    return Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
  }
  for (int32_t i = 0; i < num_inputs; ++i) {
    const FptqStatus status = CheckInput(i, in[i], in[0].type);
    if (status != FPTQ_OK) return Report(getPluginName(), __func__, status);
  }
  return Report(getPluginName(), __func__, Prepare(in[0]));
}

int32_t W4A8GemmPlugin::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc* output_desc,
                                const void* const* inputs, void* const* outputs, void* workspace,
                                cudaStream_t stream) noexcept {
  if (input_desc == nullptr || output_desc == nullptr || inputs == nullptr || outputs == nullptr) {
    return Report(getPluginName(), __func__, FPTQ_NULL_POINTER);
  }
  const FptqStatus status = Prepare(input_desc[0]);
  if (status != FPTQ_OK) return Report(getPluginName(), __func__, status);
  FptqGemmArgs args = ArgsFromInputs(inputs);
  args.y = outputs[0];
  args.workspace = workspace;
  args.workspace_bytes = workspace != nullptr ? workspace_bytes_ : 0;
  return Report(getPluginName(), __func__, fptqW4A8Linear(&desc_, &config_, &args, stream));
}

nvinfer1::IPluginV3* W4A8GemmPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept {
  W4A8GemmPlugin* copy = Copy();
  if (copy != nullptr) copy->devices_.Acquire(FindLoadedRegistry());
  return copy;
}

const nvinfer1::PluginFieldCollection* W4A8GemmPlugin::getFieldsToSerialize() noexcept {
  return &collection_;
}

}  // namespace fptq
