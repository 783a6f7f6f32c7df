#include "plugin.h"

#include <climits>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <new>

#include "device.h"
#include "log.h"
#include "tactics.h"

namespace fptq {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int32_t kMaxInputs = 6;

// Product of all dimensions but the last; 0 where one is unknown or the product does not fit.
int32_t RowsOf(const Dims& dims) noexcept {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) {
    if (dims.d[i] <= 0 || rows > INT32_MAX / dims.d[i]) return 0;
    rows *= dims.d[i];
  }
  return static_cast<int32_t>(rows);
}

bool Fits(int64_t found, int64_t expected) noexcept { return found == expected || found == -1; }

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

nvinfer1::IPluginV3* W4A8GemmPlugin::clone() noexcept {
  auto* copy = new (std::nothrow) W4A8GemmPlugin(*this);
  if (copy == nullptr) LogError("%s: out of memory", getPluginName());
  return copy;
}

const char* W4A8GemmPlugin::getPluginName() const noexcept {
  return mode_ == FPTQ_STATIC ? kStaticName : kPerTokenName;
}

const char* W4A8GemmPlugin::getPluginVersion() const noexcept { return kPluginVersion; }

const char* W4A8GemmPlugin::getPluginNamespace() const noexcept { return kPluginNamespace; }

// ---- Inputs and outputs ----

int32_t W4A8GemmPlugin::NumInputs() const noexcept {
  return 3 + (params_.scheme == FPTQ_TWO_LEVEL) + (mode_ == FPTQ_STATIC) + params_.has_bias;
}

W4A8GemmPlugin::Role W4A8GemmPlugin::RoleOf(int32_t position) const noexcept {
  if (position == NumInputs()) return Role::kY;
  const Role optional[] = {Role::kChannelScales, Role::kXScale, Role::kBias};
  const bool present[] = {params_.scheme == FPTQ_TWO_LEVEL, mode_ == FPTQ_STATIC, params_.has_bias != 0};
  if (position < 3) return static_cast<Role>(position);
  int32_t next = 3;
  for (size_t i = 0; i < std::size(optional); ++i) {
    if (present[i] && next++ == position) return optional[i];
  }
  return Role::kY;
}

bool W4A8GemmPlugin::TypeFits(Role role, DataType type, DataType x_type) const noexcept {
  switch (role) {
    case Role::kX:
      return type == DataType::kHALF || type == DataType::kBF16;
    case Role::kWeightCodes:
      return type == DataType::kINT4 || type == DataType::kINT8;
    case Role::kWeightScales:
      return type == (params_.scheme == FPTQ_TWO_LEVEL ? DataType::kINT8 : DataType::kHALF);
    case Role::kChannelScales:
    case Role::kXScale:
      return type == DataType::kFLOAT;
    case Role::kBias:
    case Role::kY:
      return type == x_type;
  }
  return false;
}

bool W4A8GemmPlugin::ShapeFits(Role role, const Dims& dims, DataType type) const noexcept {
  const int64_t padded_n = FPTQ_PADDED_N(params_.out_features);
  const int64_t padded_k = FPTQ_PADDED_K(params_.in_features);
  const int64_t groups = params_.group_size == 0 ? 1 : params_.in_features / params_.group_size;
  const bool two_level = params_.scheme == FPTQ_TWO_LEVEL;
  switch (role) {
    case Role::kX:
      return dims.nbDims >= 1 && Fits(dims.d[dims.nbDims - 1], params_.in_features);
    case Role::kY:
      return dims.nbDims >= 1 && Fits(dims.d[dims.nbDims - 1], params_.out_features);
    case Role::kWeightCodes:
      return dims.nbDims == 2 && Fits(dims.d[0], padded_n) &&
             Fits(dims.d[1], type == DataType::kINT8 ? padded_k / 2 : padded_k);
    case Role::kWeightScales:
      return dims.nbDims == (two_level ? 3 : 2) && Fits(dims.d[0], groups) && Fits(dims.d[1], padded_n) &&
             (!two_level || Fits(dims.d[2], 2));
    case Role::kChannelScales:
      return dims.nbDims == 1 && Fits(dims.d[0], padded_n);
    case Role::kXScale:
      return dims.nbDims == 0 || (dims.nbDims == 1 && Fits(dims.d[0], 1));
    case Role::kBias:
      return dims.nbDims == 1 && Fits(dims.d[0], params_.out_features);
  }
  return false;
}

FptqStatus W4A8GemmPlugin::CheckInputs(const PluginTensorDesc* const* in, int32_t num_inputs) const noexcept {
  if (num_inputs != NumInputs()) {
    LogError("%s: %d inputs, %d expected", getPluginName(), num_inputs, NumInputs());
    return FPTQ_BAD_SHAPE;
  }
  for (int32_t i = 0; i < num_inputs; ++i) {
    if (!TypeFits(RoleOf(i), in[i]->type, in[0]->type) || in[i]->format != TensorFormat::kLINEAR) {
      LogError("%s: input %d has data type %d, format %d", getPluginName(), i, static_cast<int>(in[i]->type),
               static_cast<int>(in[i]->format));
      return FPTQ_BAD_CONFIG;
    }
    if (!ShapeFits(RoleOf(i), in[i]->dims, in[i]->type)) {
      LogError("%s: input %d has a shape that does not fit %d x %d channels, group size %d", getPluginName(),
               i, params_.in_features, params_.out_features, params_.group_size);
      return FPTQ_BAD_SHAPE;
    }
  }
  return FPTQ_OK;
}

FptqGemmDesc W4A8GemmPlugin::DescFor(int32_t m, DataType type) const noexcept {
  FptqGemmDesc desc{};
  desc.m = m;
  desc.n = params_.out_features;
  desc.k = params_.in_features;
  desc.group_size = params_.group_size;
  desc.scheme = static_cast<FptqScheme>(params_.scheme);
  desc.activation_mode = mode_;
  desc.output_type = type == DataType::kBF16 ? FPTQ_BFLOAT16 : FPTQ_FLOAT16;
  desc.has_bias = params_.has_bias;
  return desc;
}

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
  if (num_outputs != 1 || num_inputs != NumInputs() || num_inputs > kMaxInputs) {
    return Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
  }
  const PluginTensorDesc* tensors[kMaxInputs];
  for (int32_t i = 0; i < num_inputs; ++i) tensors[i] = &in[i].desc;
  const FptqStatus status = CheckInputs(tensors, num_inputs);
  if (status != FPTQ_OK) return Report(getPluginName(), __func__, status);
  // Tactics are timed at the optimal shape.
  const int32_t m = RowsOf(in[0].opt.nbDims > 0 ? in[0].opt : in[0].desc.dims);
  desc_ = DescFor(m > 0 ? m : RowsOf(in[0].max), in[0].desc.type);
  prepared_ = false;
  return desc_.m > 0 ? FPTQ_OK : Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
}

size_t W4A8GemmPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                        const DynamicPluginTensorDesc* /*outputs*/,
                                        int32_t /*num_outputs*/) const noexcept {
  if (inputs == nullptr || num_inputs < 1) return 0;
  const int32_t m = RowsOf(inputs[0].max.nbDims > 0 ? inputs[0].max : inputs[0].desc.dims);
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
  FptqStatus status = CurrentDevice(&device);
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
  if (num_outputs != 1 || num_inputs != NumInputs() || num_inputs > kMaxInputs) {
    return Report(getPluginName(), __func__, FPTQ_BAD_SHAPE);
  }
  const PluginTensorDesc* tensors[kMaxInputs];
  for (int32_t i = 0; i < num_inputs; ++i) tensors[i] = &in[i];
  const FptqStatus status = CheckInputs(tensors, num_inputs);
  return Report(getPluginName(), __func__, status == FPTQ_OK ? Prepare(in[0]) : status);
}

int32_t W4A8GemmPlugin::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc* output_desc,
                                const void* const* inputs, void* const* outputs, void* workspace,
                                cudaStream_t stream) noexcept {
  if (input_desc == nullptr || output_desc == nullptr || inputs == nullptr || outputs == nullptr) {
    return Report(getPluginName(), __func__, FPTQ_NULL_POINTER);
  }
  const FptqStatus status = Prepare(input_desc[0]);
  if (status != FPTQ_OK) return Report(getPluginName(), __func__, status);
  FptqGemmArgs args{};
  args.y = outputs[0];
  args.workspace = workspace;
  args.workspace_bytes = workspace != nullptr ? workspace_bytes_ : 0;
  for (int32_t i = 0; i < NumInputs(); ++i) {
    switch (RoleOf(i)) {
      case Role::kX:
        args.x = inputs[i];
        break;
      case Role::kWeightCodes:
        args.weight_codes = inputs[i];
        break;
      case Role::kWeightScales:
        args.weight_scales = inputs[i];
        break;
      case Role::kChannelScales:
        args.channel_scales = static_cast<const float*>(inputs[i]);
        break;
      case Role::kXScale:
        args.x_scale = static_cast<const float*>(inputs[i]);
        break;
      case Role::kBias:
        args.bias = inputs[i];
        break;
      case Role::kY:
        break;
    }
  }
  return Report(getPluginName(), __func__, fptqW4A8Linear(&desc_, &config_, &args, stream));
}

nvinfer1::IPluginV3* W4A8GemmPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection* W4A8GemmPlugin::getFieldsToSerialize() noexcept {
  return &collection_;
}

}  // namespace fptq
