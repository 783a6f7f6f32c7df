// What the inputs of a node are for, what they must look like, and where they go in a call of the kernels.
#include <climits>
#include <iterator>

#include "log.h"
#include "plugin.h"

namespace fptq {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

bool Fits(int64_t found, int64_t expected) noexcept { return found == expected || found == -1; }

}  // namespace

int32_t W4A8GemmPlugin::RowsOf(const Dims& dims) noexcept {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) {
    if (dims.d[i] <= 0 || rows > INT32_MAX / dims.d[i]) return 0;
    rows *= dims.d[i];
  }
  return static_cast<int32_t>(rows);
}

int32_t W4A8GemmPlugin::LargestRows(const nvinfer1::DynamicPluginTensorDesc& x) noexcept {
  return RowsOf(x.max.nbDims > 0 ? x.max : x.desc.dims);
}

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

FptqStatus W4A8GemmPlugin::CheckInput(int32_t position, const PluginTensorDesc& tensor,
                                      DataType x_type) const noexcept {
  if (!TypeFits(RoleOf(position), tensor.type, x_type) || tensor.format != TensorFormat::kLINEAR) {
    LogError("%s: input %d has data type %d, format %d", getPluginName(), position,
             static_cast<int>(tensor.type), static_cast<int>(tensor.format));
    return FPTQ_BAD_CONFIG;
  }
  if (!ShapeFits(RoleOf(position), tensor.dims, tensor.type)) {
    LogError("%s: input %d has a shape that does not fit %d x %d channels, group size %d", getPluginName(),
             position, params_.in_features, params_.out_features, params_.group_size);
    return FPTQ_BAD_SHAPE;
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

FptqGemmArgs W4A8GemmPlugin::ArgsFromInputs(const void* const* inputs) const noexcept {
  FptqGemmArgs args{};
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
  return args;
}

}  // namespace fptq
