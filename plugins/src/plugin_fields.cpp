// Fields of a node and of a plan: their names, what they may hold, and the creators that read them.
#include <climits>
#include <cstring>
#include <initializer_list>
#include <new>

#include "bounds.h"
#include "log.h"
#include "plugin.h"

namespace fptq {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

struct FieldSpec {
  const char* name;
  int32_t PluginParams::*member;
  bool required;
};

constexpr FieldSpec kFields[kNumFields] = {
    {"layout_version", &PluginParams::layout_version, true},
    {"scheme", &PluginParams::scheme, false},
    {"group_size", &PluginParams::group_size, true},
    {"in_features", &PluginParams::in_features, true},
    {"out_features", &PluginParams::out_features, true},
    {"has_bias", &PluginParams::has_bias, false},
};

// Largest N whose padding to whole tiles fits INT32.
constexpr int32_t kMaxN = INT32_MAX - (FPTQ_TILE_N - 1);

const PluginField* Find(const PluginFieldCollection& fields, const char* name) noexcept {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    if (fields.fields[i].name != nullptr && std::strcmp(fields.fields[i].name, name) == 0)
      return &fields.fields[i];
  }
  return nullptr;
}

bool IsGroupSize(int32_t group_size) noexcept {
  for (int32_t size : FPTQ_GROUP_SIZES) {
    if (group_size == size) return true;
  }
  return false;
}

FptqStatus CheckParams(const char* name, const PluginParams& params) noexcept {
  if (params.layout_version != FPTQ_LAYOUT_VERSION) {
    LogError(
        "%s: the weights are in layout %d, this library reads layout %d: lower the graph again with this "
        "version",
        name, params.layout_version, FPTQ_LAYOUT_VERSION);
    return FPTQ_BAD_CONFIG;
  }
  if (params.scheme < FPTQ_PER_CHANNEL || params.scheme > FPTQ_TWO_LEVEL) {
    LogError("%s: scheme is %d, not 0 (per channel), 1 (group) or 2 (two_level)", name, params.scheme);
    return FPTQ_BAD_CONFIG;
  }
  const bool per_channel = params.scheme == FPTQ_PER_CHANNEL;
  if (per_channel ? params.group_size != 0 : !IsGroupSize(params.group_size)) {
    LogError("%s: group_size %d does not fit scheme %d", name, params.group_size, params.scheme);
    return FPTQ_BAD_GROUP_SIZE;
  }
  if (params.in_features > kMaxK || params.out_features > kMaxN) {
    LogError("%s: %d x %d channels are more than the kernels take: %d x %d", name, params.in_features,
             params.out_features, static_cast<int32_t>(kMaxK), kMaxN);
    return FPTQ_BAD_SHAPE;
  }
  if (params.in_features <= 0 || params.out_features <= 0 || params.out_features % FPTQ_MIN_N_MULTIPLE != 0 ||
      (!per_channel && params.in_features % params.group_size != 0)) {
    LogError("%s: %d x %d channels: out_features must be a multiple of %d, in_features of group_size %d",
             name, params.in_features, params.out_features, FPTQ_MIN_N_MULTIPLE, params.group_size);
    return FPTQ_BAD_SHAPE;
  }
  if (params.has_bias != 0 && params.has_bias != 1) {
    LogError("%s: has_bias is %d, not 0 or 1", name, params.has_bias);
    return FPTQ_BAD_CONFIG;
  }
  return FPTQ_OK;
}

}  // namespace

FptqStatus ParamsFromFields(const char* name, const PluginFieldCollection* fields,
                            PluginParams* params) noexcept {
  if (fields == nullptr || params == nullptr || (fields->nbFields > 0 && fields->fields == nullptr)) {
    LogError("%s: no fields", name);
    return FPTQ_NULL_POINTER;
  }
  PluginParams read;
  for (const FieldSpec& spec : kFields) {
    const PluginField* field = Find(*fields, spec.name);
    if (field == nullptr) {
      if (!spec.required) continue;
      LogError("%s: field %s is missing: the graph was not lowered for this plugin", name, spec.name);
      return FPTQ_BAD_CONFIG;
    }
    if (field->type != PluginFieldType::kINT32 || field->length != 1 || field->data == nullptr) {
      LogError("%s: field %s is not one INT32", name, spec.name);
      return FPTQ_BAD_CONFIG;
    }
    std::memcpy(&(read.*spec.member), field->data, sizeof(int32_t));
  }
  const FptqStatus status = CheckParams(name, read);
  if (status == FPTQ_OK) *params = read;
  return status;
}

void W4A8GemmPlugin::PointToOwnFields() noexcept {
  for (int32_t i = 0; i < kNumFields; ++i) {
    fields_[i] = PluginField(kFields[i].name, &(params_.*kFields[i].member), PluginFieldType::kINT32, 1);
  }
  collection_.nbFields = kNumFields;
  collection_.fields = fields_;
}

W4A8GemmCreator::W4A8GemmCreator(FptqActivationMode mode) noexcept : mode_(mode) {
  for (int32_t i = 0; i < kNumFields; ++i) {
    fields_[i] = PluginField(kFields[i].name, nullptr, PluginFieldType::kINT32, 1);
  }
  collection_.nbFields = kNumFields;
  collection_.fields = fields_;
}

nvinfer1::IPluginV3* W4A8GemmCreator::createPlugin(const char* name, const PluginFieldCollection* fields,
                                                   nvinfer1::TensorRTPhase /*phase*/) noexcept {
  PluginParams params;
  // `name` is the layer's: it says which of a model's many nodes is wrong.
  if (ParamsFromFields(name != nullptr ? name : getPluginName(), fields, &params) != FPTQ_OK) return nullptr;
  auto* plugin = new (std::nothrow) W4A8GemmPlugin(params, mode_);
  if (plugin == nullptr) LogError("%s: out of memory", getPluginName());
  return plugin;
}

const PluginFieldCollection* W4A8GemmCreator::getFieldNames() noexcept { return &collection_; }

const char* W4A8GemmCreator::getPluginName() const noexcept {
  return mode_ == FPTQ_STATIC ? kStaticName : kPerTokenName;
}

const char* W4A8GemmCreator::getPluginVersion() const noexcept { return kPluginVersion; }

const char* W4A8GemmCreator::getPluginNamespace() const noexcept { return kPluginNamespace; }

nvinfer1::IPluginCreatorInterface* const* Creators(int32_t* count) noexcept {
  static W4A8GemmCreator static_creator(FPTQ_STATIC);
  static W4A8GemmCreator per_token_creator(FPTQ_PER_TOKEN);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&static_creator, &per_token_creator};
  if (count != nullptr) *count = 2;
  return creators;
}

}  // namespace fptq
