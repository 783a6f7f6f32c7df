// The life of a plugin without a GPU: creators, fields, interface methods, clones, errors.
// TensorRT's part is played by this file; the kernels are a double.
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "harness.h"
#include "kernels_double.h"
#include "plugin.h"
#include "registry_abi.h"
#include "tactics.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

constexpr int32_t kN = 200, kPaddedN = 208, kK = 192, kGroup = 64;

// Fields of a node, as a parser hands them over.
struct Fields {
  std::map<std::string, int32_t> values = {{"layout_version", 1},  {"scheme", 1},
                                           {"group_size", kGroup}, {"in_features", kK},
                                           {"out_features", kN},   {"has_bias", 0}};
  std::vector<PluginField> fields;
  PluginFieldCollection collection{};

  PluginFieldCollection* Get() {
    fields.clear();
    for (const auto& [name, value] : values)
      fields.emplace_back(name.c_str(), &value, PluginFieldType::kINT32, 1);
    collection = {static_cast<int32_t>(fields.size()), fields.data()};
    return &collection;
  }
};

fptq::W4A8GemmCreator& Creator(FptqActivationMode mode) {
  static fptq::W4A8GemmCreator creators[] = {fptq::W4A8GemmCreator(FPTQ_STATIC),
                                             fptq::W4A8GemmCreator(FPTQ_PER_TOKEN)};
  return creators[mode];
}

struct Plugin {
  std::unique_ptr<nvinfer1::IPluginV3> owner;
  nvinfer1::IPluginV3OneCore* core = nullptr;
  nvinfer1::IPluginV3OneBuild* build = nullptr;
  nvinfer1::IPluginV3OneRuntime* runtime = nullptr;

  explicit Plugin(nvinfer1::IPluginV3* plugin) : owner(plugin) {
    using nvinfer1::PluginCapabilityType;
    if (plugin == nullptr) return;
    core =
        static_cast<nvinfer1::IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuild*>(
        plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  }
};

Plugin Make(FptqActivationMode mode, const std::map<std::string, int32_t>& changes = {},
            TensorRTPhase phase = TensorRTPhase::kBUILD) {
  Fields fields;
  for (const auto& [name, value] : changes) fields.values[name] = value;
  return Plugin(Creator(mode).createPlugin("layer", fields.Get(), phase));
}

bool Refuses(const std::map<std::string, int32_t>& changes) {
  return Make(FPTQ_STATIC, changes).owner == nullptr;
}

Dims MakeDims(std::initializer_list<int64_t> sizes) {
  Dims dims{};
  for (int64_t size : sizes) dims.d[dims.nbDims++] = size;
  return dims;
}

PluginTensorDesc Tensor(std::initializer_list<int64_t> dims, DataType type) {
  PluginTensorDesc desc{};
  desc.dims = MakeDims(dims);
  desc.type = type;
  desc.format = TensorFormat::kLINEAR;
  return desc;
}

// Inputs, then the output, of a static linear with x [2, m, K].
std::vector<PluginTensorDesc> Tensors(int64_t m, DataType type = DataType::kHALF) {
  return {Tensor({2, m, kK}, type), Tensor({kPaddedN, kK}, DataType::kINT4),
          Tensor({kK / kGroup, kPaddedN}, DataType::kHALF), Tensor({}, DataType::kFLOAT),
          Tensor({2, m, kN}, type)};
}

std::vector<DynamicPluginTensorDesc> Dynamic(const std::vector<PluginTensorDesc>& tensors, int64_t largest) {
  std::vector<DynamicPluginTensorDesc> result(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    result[i].desc = tensors[i];
    result[i].min = result[i].opt = result[i].max = tensors[i].dims;
  }
  for (size_t i : {size_t{0}, tensors.size() - 1}) result[i].max.d[1] = largest;
  return result;
}

FptqGemmConfig Config(int32_t block_m, int32_t split_k) {
  return {FPTQ_KERNEL_GEMM, block_m, 128, 64, 32, 32, 4, split_k};
}

// A double that finds a GPU and offers two configurations; forgotten at the end of the test.
struct WithGpu {
  WithGpu() {
    ResetDouble();
    TheDouble().device_status = FPTQ_OK;
    TheDouble().candidates[0] = Config(128, 8);
    TheDouble().candidates[1] = Config(64, 1);
    TheDouble().num_candidates = 2;
  }
  ~WithGpu() { ResetDouble(); }
};

// TensorRT's expressions, for shapes of constants and of one kind of unknown.
struct Expressions final : nvinfer1::apiv::VExprBuilder {
  struct Value final : nvinfer1::apiv::VDimensionExpr {
    bool known = true;
    int64_t value = 0;
    bool isConstant() const noexcept override { return known; }
    int64_t getConstantValue() const noexcept override { return value; }
    bool isSizeTensor() const noexcept override { return false; }
  };
  struct Expression final : nvinfer1::IDimensionExpr {
    Value own;
    Expression(bool known, int64_t value) {
      own.known = known;
      own.value = value;
      mImpl = &own;
    }
  };
  struct Builder final : nvinfer1::IExprBuilder {
    explicit Builder(Expressions* expressions) { mImpl = expressions; }
  };
  std::deque<Expression> made;
  const nvinfer1::IDimensionExpr* constant(int64_t value) noexcept override {
    return &made.emplace_back(true, value);
  }
  const nvinfer1::IDimensionExpr* unknown() { return &made.emplace_back(false, 0); }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                                            const nvinfer1::IDimensionExpr&) noexcept override {
    return nullptr;
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) noexcept override {
    return nullptr;
  }
};

}  // namespace

// ---- Creators ----

TEST(TheLibraryExportsOneCreatorForEachMode) {
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
  setLoggerFinder(nullptr);
  EXPECT_EQ(count, 2);
  const char* const names[] = {"FptqW4A8GemmStatic", "FptqW4A8GemmPerToken"};
  for (int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    EXPECT_EQ(std::string(creator->getPluginName()), names[i]);
    EXPECT_EQ(std::string(creator->getPluginNamespace()), "fptq");
    EXPECT_EQ(std::string(creator->getPluginVersion()), "2");
    EXPECT_EQ(std::string(creator->getInterfaceInfo().kind), "PLUGIN CREATOR_V3ONE");
  }
}

TEST(EveryFieldIsAnnounced) {
  const PluginFieldCollection* announced = Creator(FPTQ_STATIC).getFieldNames();
  EXPECT_EQ(announced->nbFields, static_cast<int32_t>(Fields().values.size()));
  for (int32_t i = 0; i < announced->nbFields; ++i) {
    EXPECT_EQ(Fields().values.count(announced->fields[i].name), size_t{1});
    EXPECT(announced->fields[i].type == PluginFieldType::kINT32);
  }
}

TEST(APluginKnowsItsNameAndItsInterfaces) {
  for (FptqActivationMode mode : {FPTQ_STATIC, FPTQ_PER_TOKEN}) {
    Plugin plugin = Make(mode);
    EXPECT(plugin.core != nullptr && plugin.build != nullptr && plugin.runtime != nullptr);
    EXPECT_EQ(std::string(plugin.core->getPluginName()), Creator(mode).getPluginName());
    EXPECT_EQ(std::string(plugin.build->getInterfaceInfo().kind), "PLUGIN_V3ONE_BUILD");
    EXPECT_EQ(std::string(plugin.runtime->getInterfaceInfo().kind), "PLUGIN_V3ONE_RUNTIME");
    EXPECT_EQ(plugin.build->getNbOutputs(), 1);
  }
}

TEST(WrongFieldsGiveNoPlugin) {
  EXPECT(Refuses({{"layout_version", 2}}));
  EXPECT(Refuses({{"scheme", 3}}));
  EXPECT(Refuses({{"group_size", 48}}));
  EXPECT(Refuses({{"group_size", 0}}));
  EXPECT(Refuses({{"scheme", 0}}));
  EXPECT(Refuses({{"in_features", 100}}));
  EXPECT(Refuses({{"in_features", -64}}));
  EXPECT(Refuses({{"out_features", 100}}));
  EXPECT(Refuses({{"out_features", 0}}));
  EXPECT(Refuses({{"has_bias", 2}}));
  EXPECT(!Refuses({{"scheme", 0}, {"group_size", 0}}));
}

TEST(ChannelsThatNoKernelTakesGiveNoPlugin) {
  // Otherwise an engine is built on a machine without a GPU and fails where it runs.
  EXPECT(!Refuses({{"in_features", 65536}}));
  EXPECT(Refuses({{"in_features", 65536 + kGroup}}));
  EXPECT(Refuses({{"scheme", 0}, {"group_size", 0}, {"in_features", INT32_MAX}}));
  EXPECT(Refuses({{"out_features", INT32_MAX - 7}}));
}

TEST(PaddingTheLargestOutputDoesNotOverflow) {
  Plugin plugin = Make(FPTQ_STATIC, {{"out_features", INT32_MAX - 15}});
  EXPECT(plugin.owner != nullptr);
  const auto dynamic = Dynamic(Tensors(4), 16);
  EXPECT_EQ(plugin.build->configurePlugin(dynamic.data(), 4, &dynamic[4], 1), FPTQ_BAD_SHAPE);
}

TEST(MissingFieldsGiveNoPlugin) {
  for (const char* name : {"layout_version", "group_size", "in_features", "out_features"}) {
    Fields fields;
    fields.values.erase(name);
    EXPECT(Creator(FPTQ_STATIC).createPlugin("layer", fields.Get(), TensorRTPhase::kBUILD) == nullptr);
  }
  EXPECT(Creator(FPTQ_STATIC).createPlugin("layer", nullptr, TensorRTPhase::kBUILD) == nullptr);
  EXPECT(Creator(FPTQ_STATIC).createPlugin(nullptr, nullptr, TensorRTPhase::kRUNTIME) == nullptr);
}

TEST(MalformedFieldsGiveNoPlugin) {
  const auto refuses = [](auto change) {
    Fields fields;
    fields.Get();
    change(fields.fields[0]);
    return Creator(FPTQ_STATIC).createPlugin("layer", &fields.collection, TensorRTPhase::kBUILD) == nullptr;
  };
  EXPECT(refuses([](PluginField& field) { field.type = PluginFieldType::kFLOAT32; }));
  EXPECT(refuses([](PluginField& field) { field.length = 2; }));
  EXPECT(refuses([](PluginField& field) { field.data = nullptr; }));
  EXPECT(refuses([](PluginField& field) { field.name = nullptr; }));
}

// ---- Serialization ----

TEST(SerializedFieldsMakeTheSamePluginAgain) {
  Plugin first = Make(FPTQ_PER_TOKEN, {{"has_bias", 1}, {"group_size", 32}});
  Plugin second(Creator(FPTQ_PER_TOKEN)
                    .createPlugin("plan", first.runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  EXPECT(second.owner != nullptr);
  const PluginFieldCollection* a = first.runtime->getFieldsToSerialize();
  const PluginFieldCollection* b = second.runtime->getFieldsToSerialize();
  EXPECT_EQ(a->nbFields, fptq::kNumFields);
  for (int32_t i = 0; i < a->nbFields; ++i) {
    EXPECT_EQ(std::string(a->fields[i].name), b->fields[i].name);
    EXPECT_EQ(std::memcmp(a->fields[i].data, b->fields[i].data, sizeof(int32_t)), 0);
    EXPECT(a->fields[i].data != b->fields[i].data);
  }
  EXPECT_EQ(std::string(first.build->getTimingCacheID()), second.build->getTimingCacheID());
}

TEST(TimingsAreSharedByEqualPluginsOnly) {
  const auto id = [](FptqActivationMode mode, const std::map<std::string, int32_t>& changes) {
    return std::string(Make(mode, changes).build->getTimingCacheID());
  };
  EXPECT_EQ(id(FPTQ_STATIC, {}), id(FPTQ_STATIC, {}));
  EXPECT(id(FPTQ_STATIC, {}) != id(FPTQ_PER_TOKEN, {}));
  EXPECT(id(FPTQ_STATIC, {}) != id(FPTQ_STATIC, {{"group_size", 32}}));
  EXPECT(id(FPTQ_STATIC, {}) != id(FPTQ_STATIC, {{"has_bias", 1}}));
}

// ---- Build ----

TEST(TheOutputHasTheTypeOfX) {
  for (DataType type : {DataType::kHALF, DataType::kBF16}) {
    const DataType inputs[] = {type, DataType::kINT4, DataType::kHALF, DataType::kFLOAT};
    DataType output = DataType::kINT32;
    EXPECT_EQ(Make(FPTQ_STATIC).build->getOutputDataTypes(&output, 1, inputs, 4), FPTQ_OK);
    EXPECT(output == type);
    EXPECT(Make(FPTQ_PER_TOKEN).build->getOutputDataTypes(&output, 1, inputs, 4) != FPTQ_OK);
  }
  const DataType wide[] = {DataType::kFLOAT, DataType::kINT4, DataType::kHALF, DataType::kFLOAT};
  DataType output;
  EXPECT_EQ(Make(FPTQ_STATIC).build->getOutputDataTypes(&output, 1, wide, 4), FPTQ_BAD_CONFIG);
  EXPECT_EQ(Make(FPTQ_STATIC).build->getOutputDataTypes(nullptr, 1, wide, 4), FPTQ_NULL_POINTER);
}

TEST(TheOutputShapeReplacesTheLastDimension) {
  Expressions expressions;
  Expressions::Builder builder(&expressions);
  nvinfer1::DimsExprs inputs[4] = {};
  inputs[0].nbDims = 3;
  const nvinfer1::IDimensionExpr* rows = expressions.unknown();
  inputs[0].d[0] = expressions.constant(2);
  inputs[0].d[1] = rows;
  inputs[0].d[2] = expressions.constant(kK);
  nvinfer1::DimsExprs output{};
  EXPECT_EQ(Make(FPTQ_STATIC).build->getOutputShapes(inputs, 4, nullptr, 0, &output, 1, builder), FPTQ_OK);
  EXPECT_EQ(output.nbDims, 3);
  EXPECT(output.d[1] == rows);
  EXPECT_EQ(output.d[2]->getConstantValue(), kN);
  inputs[0].d[2] = expressions.constant(kK + 1);
  EXPECT_EQ(Make(FPTQ_STATIC).build->getOutputShapes(inputs, 4, nullptr, 0, &output, 1, builder),
            FPTQ_BAD_SHAPE);
  EXPECT_EQ(Make(FPTQ_STATIC).build->getOutputShapes(inputs, 3, nullptr, 0, &output, 1, builder),
            FPTQ_BAD_SHAPE);
  EXPECT_EQ(Make(FPTQ_STATIC).build->getOutputShapes(nullptr, 4, nullptr, 0, &output, 1, builder),
            FPTQ_NULL_POINTER);
}

TEST(OnlyLinearFormatsOfTheRightTypesAreSupported) {
  Plugin plugin = Make(FPTQ_STATIC);
  for (DataType type : {DataType::kHALF, DataType::kBF16}) {
    const auto tensors = Dynamic(Tensors(4, type), 4);
    for (int32_t i = 0; i < 5; ++i) EXPECT(plugin.build->supportsFormatCombination(i, tensors.data(), 4, 1));
    EXPECT(!plugin.build->supportsFormatCombination(5, tensors.data(), 4, 1));
    EXPECT(!plugin.build->supportsFormatCombination(-1, tensors.data(), 4, 1));
    EXPECT(!plugin.build->supportsFormatCombination(0, tensors.data(), 3, 1));
  }
  const auto supports = [&](int32_t position, DataType type, TensorFormat format) {
    auto tensors = Dynamic(Tensors(4), 4);
    tensors[position].desc.type = type;
    tensors[position].desc.format = format;
    return plugin.build->supportsFormatCombination(position, tensors.data(), 4, 1);
  };
  EXPECT(supports(1, DataType::kINT8, TensorFormat::kLINEAR));
  EXPECT(!supports(1, DataType::kINT32, TensorFormat::kLINEAR));
  EXPECT(!supports(0, DataType::kFLOAT, TensorFormat::kLINEAR));
  EXPECT(!supports(0, DataType::kHALF, TensorFormat::kCHW32));
  EXPECT(!supports(2, DataType::kBF16, TensorFormat::kLINEAR));
  EXPECT(!supports(3, DataType::kHALF, TensorFormat::kLINEAR));
  EXPECT(!supports(4, DataType::kBF16, TensorFormat::kLINEAR));
}

TEST(ConfiguringChecksTypesAndShapes) {
  Plugin plugin = Make(FPTQ_STATIC);
  const auto configure = [&](auto change) {
    auto tensors = Tensors(4);
    change(tensors);
    const auto dynamic = Dynamic(tensors, 16);
    return plugin.build->configurePlugin(dynamic.data(), 4, &dynamic[4], 1);
  };
  EXPECT_EQ(configure([](auto&) {}), FPTQ_OK);
  EXPECT_EQ(configure([](auto& t) { t[1] = Tensor({kPaddedN, kK / 2}, DataType::kINT8); }), FPTQ_OK);
  EXPECT_EQ(configure([](auto& t) { t[3] = Tensor({1}, DataType::kFLOAT); }), FPTQ_OK);
  EXPECT_EQ(configure([](auto& t) { t[0].dims.d[2] = kK + 64; }), FPTQ_BAD_SHAPE);
  EXPECT_EQ(configure([](auto& t) { t[1] = Tensor({kN, kK}, DataType::kINT4); }), FPTQ_BAD_SHAPE);
  EXPECT_EQ(configure([](auto& t) { t[1] = Tensor({kK, kN}, DataType::kINT4); }), FPTQ_BAD_SHAPE);
  EXPECT_EQ(configure([](auto& t) { t[1] = Tensor({kPaddedN, kK}, DataType::kINT8); }), FPTQ_BAD_SHAPE);
  EXPECT_EQ(configure([](auto& t) { t[2] = Tensor({kK / kGroup, kN}, DataType::kHALF); }), FPTQ_BAD_SHAPE);
  EXPECT_EQ(configure([](auto& t) { t[3] = Tensor({2}, DataType::kFLOAT); }), FPTQ_BAD_SHAPE);
  EXPECT_EQ(configure([](auto& t) { t[2].type = DataType::kFLOAT; }), FPTQ_BAD_CONFIG);
  const auto dynamic = Dynamic(Tensors(4), 16);
  EXPECT_EQ(plugin.build->configurePlugin(dynamic.data(), 3, &dynamic[4], 1), FPTQ_BAD_SHAPE);
  EXPECT_EQ(plugin.build->configurePlugin(nullptr, 4, &dynamic[4], 1), FPTQ_NULL_POINTER);
}

TEST(AProfileWhoseLargestShapeDoesNotFitIsRefused) {
  // Its workspace cannot be computed: an answer of 0 bytes would let the kernels write into memory of others.
  Plugin plugin = Make(FPTQ_STATIC);
  for (int64_t largest : {int64_t{INT32_MAX}, int64_t{-1}, INT64_MAX}) {
    const auto dynamic = Dynamic(Tensors(4), largest);
    EXPECT_EQ(plugin.build->configurePlugin(dynamic.data(), 4, &dynamic[4], 1), FPTQ_BAD_SHAPE);
  }
}

TEST(BiasAndTwoLevelScalesComeAfterTheWeight) {
  WithGpu gpu;
  Plugin plugin = Make(FPTQ_STATIC, {{"has_bias", 1}, {"scheme", 2}});
  std::vector<PluginTensorDesc> tensors = {Tensor({4, kK}, DataType::kBF16),
                                           Tensor({kPaddedN, kK}, DataType::kINT4),
                                           Tensor({kK / kGroup, kPaddedN, 2}, DataType::kINT8),
                                           Tensor({kPaddedN}, DataType::kFLOAT),
                                           Tensor({}, DataType::kFLOAT),
                                           Tensor({kN}, DataType::kBF16),
                                           Tensor({4, kN}, DataType::kBF16)};
  std::array<char, 8> memory{};
  const void* inputs[6];
  for (int32_t i = 0; i < 6; ++i) inputs[i] = &memory[i];
  void* output = &memory[6];
  EXPECT_EQ(plugin.runtime->onShapeChange(tensors.data(), 6, &tensors[6], 1), FPTQ_OK);
  EXPECT_EQ(plugin.runtime->enqueue(tensors.data(), &tensors[6], inputs, &output, &memory[7], nullptr),
            FPTQ_OK);
  const FptqGemmArgs& args = TheDouble().linear_args;
  EXPECT(args.x == inputs[0] && args.weight_codes == inputs[1] && args.weight_scales == inputs[2]);
  EXPECT(args.channel_scales == inputs[3] && args.x_scale == inputs[4] && args.bias == inputs[5] &&
         args.y == output);
  EXPECT_EQ(TheDouble().linear_desc.output_type, FPTQ_BFLOAT16);
  EXPECT_EQ(TheDouble().linear_desc.has_bias, 1);
  EXPECT_EQ(TheDouble().linear_desc.scheme, FPTQ_TWO_LEVEL);
}

TEST(APerTokenPluginHasNoScaleInput) {
  WithGpu gpu;
  Plugin plugin = Make(FPTQ_PER_TOKEN);
  auto tensors = Tensors(4);
  tensors.erase(tensors.begin() + 3);
  char memory[5] = {};
  const void* inputs[] = {&memory[0], &memory[1], &memory[2]};
  void* output = &memory[3];
  EXPECT_EQ(plugin.runtime->enqueue(tensors.data(), &tensors[3], inputs, &output, &memory[4], nullptr),
            FPTQ_OK);
  EXPECT(TheDouble().linear_args.x_scale == nullptr);
  EXPECT_EQ(TheDouble().linear_desc.activation_mode, FPTQ_PER_TOKEN);
}

// ---- Workspace and tactics ----

TEST(TheWorkspaceOfTheLargestMServesEveryM) {
  WithGpu gpu;
  Plugin plugin = Make(FPTQ_STATIC);
  const auto dynamic = Dynamic(Tensors(4), 100);
  const size_t granted = plugin.build->getWorkspaceSize(dynamic.data(), 4, &dynamic[4], 1);
  std::array<char, 8> memory{};
  const void* inputs[] = {&memory[0], &memory[1], &memory[2], &memory[3]};
  void* output = &memory[4];
  for (int64_t m = 1; m <= 100; ++m) {
    const auto tensors = Tensors(m);
    EXPECT_EQ(plugin.runtime->enqueue(tensors.data(), &tensors[4], inputs, &output, &memory[5], nullptr),
              FPTQ_OK);
    const size_t needed = fptqWorkspaceBytes(&TheDouble().linear_desc, &TheDouble().linear_config);
    EXPECT(needed <= TheDouble().linear_args.workspace_bytes);
    EXPECT(TheDouble().linear_args.workspace_bytes <= granted);
  }
  EXPECT_EQ(TheDouble().linear_calls, 100);
  EXPECT_EQ(plugin.build->getWorkspaceSize(nullptr, 4, nullptr, 1), size_t{0});
}

TEST(WithoutAGpuThereIsNothingToTime) {
  ResetDouble();
  Plugin plugin = Make(FPTQ_STATIC);
  const auto dynamic = Dynamic(Tensors(4), 16);
  EXPECT_EQ(plugin.build->configurePlugin(dynamic.data(), 4, &dynamic[4], 1), FPTQ_OK);
  EXPECT_EQ(plugin.build->getNbTactics(), 0);
  EXPECT_EQ(plugin.build->getValidTactics(nullptr, 0), FPTQ_OK);
  int32_t tactic = 0;
  EXPECT_EQ(plugin.build->getValidTactics(&tactic, 1), FPTQ_UNSUPPORTED_DEVICE);
}

TEST(TacticsAreUniqueAndNotZero) {
  WithGpu gpu;
  TheDouble().candidates[2] = TheDouble().candidates[0];
  TheDouble().num_candidates = 3;
  Plugin plugin = Make(FPTQ_STATIC);
  EXPECT_EQ(plugin.build->getNbTactics(), 2);
  int32_t tactics[2] = {};
  EXPECT_EQ(plugin.build->getValidTactics(tactics, 2), FPTQ_OK);
  EXPECT(tactics[0] > 0 && tactics[1] > 0 && tactics[0] != tactics[1]);
  EXPECT_EQ(plugin.build->getValidTactics(tactics, 1), FPTQ_BAD_CONFIG);
}

TEST(AChangeOfAnyNumberOfAConfigurationIsAnotherTactic) {
  const FptqGemmConfig base = Config(128, 1);
  int32_t FptqGemmConfig::*const numbers[] = {
      &FptqGemmConfig::block_m, &FptqGemmConfig::block_n, &FptqGemmConfig::block_k, &FptqGemmConfig::warp_m,
      &FptqGemmConfig::warp_n,  &FptqGemmConfig::stages,  &FptqGemmConfig::split_k};
  for (auto number : numbers) {
    FptqGemmConfig other = base;
    other.*number += 1;
    EXPECT(fptq::TacticFromConfig(other) != fptq::TacticFromConfig(base));
  }
}

TEST(TheTimedTacticRunsWhereItFitsAndTheBestElsewhere) {
  WithGpu gpu;
  Plugin plugin = Make(FPTQ_STATIC);
  std::array<char, 8> memory{};
  const void* inputs[] = {&memory[0], &memory[1], &memory[2], &memory[3]};
  void* output = &memory[4];
  const auto run = [&](int64_t m, int32_t tactic) {
    const auto tensors = Tensors(m);
    EXPECT_EQ(plugin.runtime->setTactic(tactic), FPTQ_OK);
    EXPECT_EQ(plugin.runtime->enqueue(tensors.data(), &tensors[4], inputs, &output, &memory[5], nullptr),
              FPTQ_OK);
    return TheDouble().linear_config.block_m;
  };
  EXPECT_EQ(run(4, 0), 128);
  EXPECT_EQ(run(4, fptq::TacticFromConfig(Config(64, 1))), 64);
  EXPECT_EQ(run(4, fptq::TacticFromConfig(Config(32, 1))), 128);
  EXPECT_EQ(plugin.runtime->setTactic(-1), FPTQ_BAD_CONFIG);
}

TEST(AConfigurationThatNeedsMoreWorkspaceIsPassedOver) {
  WithGpu gpu;
  TheDouble().device.multiprocessors = 1000;  // larger than any GPU the bound was made for
  TheDouble().num_own = 1;
  FptqGemmDesc desc{};
  desc.m = 8;
  desc.n = kN;
  desc.k = kK;
  desc.group_size = kGroup;
  FptqGemmConfig config{};
  EXPECT(fptqWorkspaceBytes(&desc, &TheDouble().candidates[0]) > fptq::WorkspaceBound(desc));
  for (int32_t tactic : {0, fptq::TacticFromConfig(TheDouble().candidates[0])}) {
    EXPECT_EQ(fptq::ConfigForCall(desc, TheDouble().device, tactic, &config), FPTQ_OK);
    EXPECT_EQ(config.block_m, 64);
  }
  TheDouble().num_candidates = 1;
  EXPECT_EQ(fptq::ConfigForCall(desc, TheDouble().device, 0, &config), FPTQ_SMALL_WORKSPACE);
  TheDouble().num_candidates = 0;
  TheDouble().num_own = 0;
  EXPECT_EQ(fptq::ConfigForCall(desc, TheDouble().device, 0, &config), FPTQ_BAD_CONFIG);
}

TEST(TheBoundGrowsWithM) {
  WithGpu gpu;
  FptqGemmDesc desc{};
  desc.n = kN;
  desc.k = kK;
  desc.group_size = kGroup;
  size_t before = 0;
  for (desc.m = 1; desc.m <= 300; ++desc.m) {
    const size_t bound = fptq::WorkspaceBound(desc);
    EXPECT(bound >= before);
    before = bound;
  }
}

// ---- Run ----

TEST(ErrorsOfTheKernelsAreReturned) {
  WithGpu gpu;
  Plugin plugin = Make(FPTQ_STATIC);
  const auto tensors = Tensors(4);
  char memory[8] = {};
  const void* inputs[] = {&memory[0], &memory[1], &memory[2], &memory[3]};
  void* output = &memory[4];
  for (FptqStatus status : {FPTQ_CUDA_ERROR, FPTQ_BAD_ALIGNMENT, FPTQ_SMALL_WORKSPACE}) {
    TheDouble().linear_status = status;
    EXPECT_EQ(plugin.runtime->enqueue(tensors.data(), &tensors[4], inputs, &output, &memory[5], nullptr),
              status);
  }
  EXPECT_EQ(plugin.runtime->enqueue(nullptr, &tensors[4], inputs, &output, &memory[5], nullptr),
            FPTQ_NULL_POINTER);
  EXPECT_EQ(plugin.runtime->enqueue(tensors.data(), &tensors[4], nullptr, &output, &memory[5], nullptr),
            FPTQ_NULL_POINTER);
}

TEST(WithoutAGpuNothingRunsAndNothingBreaks) {
  ResetDouble();
  Plugin plugin = Make(FPTQ_STATIC);
  const auto tensors = Tensors(4);
  char memory[8] = {};
  const void* inputs[] = {&memory[0], &memory[1], &memory[2], &memory[3]};
  void* output = &memory[4];
  EXPECT_EQ(plugin.runtime->onShapeChange(tensors.data(), 4, &tensors[4], 1), FPTQ_UNSUPPORTED_DEVICE);
  EXPECT_EQ(plugin.runtime->enqueue(tensors.data(), &tensors[4], inputs, &output, &memory[5], nullptr),
            FPTQ_UNSUPPORTED_DEVICE);
  EXPECT_EQ(TheDouble().linear_calls, 0);
}

TEST(EmptyAndHugeShapesAreRefused) {
  WithGpu gpu;
  Plugin plugin = Make(FPTQ_STATIC);
  for (int64_t m : {int64_t{0}, int64_t{-1}, int64_t{INT32_MAX}, INT64_MAX}) {
    const auto tensors = Tensors(m);
    EXPECT_EQ(plugin.runtime->onShapeChange(tensors.data(), 4, &tensors[4], 1), FPTQ_BAD_SHAPE);
  }
}

TEST(AMissingWorkspaceIsToldToTheKernel) {
  WithGpu gpu;
  Plugin plugin = Make(FPTQ_STATIC);
  const auto tensors = Tensors(4);
  char memory[8] = {};
  const void* inputs[] = {&memory[0], &memory[1], &memory[2], &memory[3]};
  void* output = &memory[4];
  EXPECT_EQ(plugin.runtime->enqueue(tensors.data(), &tensors[4], inputs, &output, nullptr, nullptr), FPTQ_OK);
  EXPECT_EQ(TheDouble().linear_args.workspace_bytes, size_t{0});
}

// ---- Clones ----

TEST(ACloneKeepsTheTacticAndOwnsItsFields) {
  WithGpu gpu;
  Plugin first = Make(FPTQ_STATIC);
  EXPECT_EQ(first.runtime->setTactic(fptq::TacticFromConfig(Config(64, 1))), FPTQ_OK);
  Plugin second(first.owner->clone());
  const void* fields = first.runtime->getFieldsToSerialize();
  first.owner.reset();
  EXPECT(second.runtime->getFieldsToSerialize() != fields);
  const auto tensors = Tensors(4);
  char memory[8] = {};
  const void* inputs[] = {&memory[0], &memory[1], &memory[2], &memory[3]};
  void* output = &memory[4];
  EXPECT_EQ(second.runtime->enqueue(tensors.data(), &tensors[4], inputs, &output, &memory[5], nullptr),
            FPTQ_OK);
  EXPECT_EQ(TheDouble().linear_config.block_m, 64);
  EXPECT_EQ(*static_cast<const int32_t*>(second.runtime->getFieldsToSerialize()->fields[0].data),
            FPTQ_LAYOUT_VERSION);
}

TEST(ContextsShareNothingThatChanges) {
  WithGpu gpu;
  Plugin shared = Make(FPTQ_STATIC);
  std::vector<std::thread> threads;
  std::vector<int32_t> results(8, -1);
  for (int32_t i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      int32_t result = FPTQ_OK;
      for (int64_t m = 1; m <= 50; ++m) {
        Plugin context(shared.runtime->attachToContext(nullptr));
        const auto tensors = Tensors(m + i);
        result |= context.runtime->onShapeChange(tensors.data(), 4, &tensors[4], 1);
        Plugin copy(context.owner->clone());
        result |= copy.runtime->getFieldsToSerialize()->nbFields != fptq::kNumFields;
      }
      results[i] = result;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t result : results) EXPECT_EQ(result, FPTQ_OK);
}

// ---- Registry ----

// The Itanium C++ ABI represents a pointer to a virtual member as 1 + the byte offset of its entry.
template <typename Member>
int32_t EntryOf(Member member) {
  intptr_t offset = 0;
  std::memcpy(&offset, &member, sizeof(offset));
  return static_cast<int32_t>((offset - 1) / static_cast<intptr_t>(sizeof(void*)));
}

TEST(TheEntriesOfTheRegistryAreThoseOfTheHeaders) {
  using nvinfer1::IPluginRegistry;
  using Register =
      bool (IPluginRegistry::*)(nvinfer1::IPluginCreatorInterface&, const nvinfer1::AsciiChar*) noexcept;
  const Register pointer = &IPluginRegistry::registerCreator;
  EXPECT_EQ(EntryOf(pointer), fptq::RegisterCreatorEntry(NV_TENSORRT_MAJOR));
  EXPECT_EQ(EntryOf(&IPluginRegistry::acquirePluginResource), fptq::AcquireResourceEntry(NV_TENSORRT_MAJOR));
  EXPECT_EQ(EntryOf(&IPluginRegistry::releasePluginResource), fptq::ReleaseResourceEntry(NV_TENSORRT_MAJOR));
}

TEST(AnUnknownTensorRTIsNotRegisteredWith) {
  for (int32_t major : {0, 8, 9, 12}) {
    EXPECT_EQ(fptq::RegisterCreatorEntry(major), fptq::kUnknownEntry);
    EXPECT_EQ(fptq::AcquireResourceEntry(major), fptq::kUnknownEntry);
    EXPECT_EQ(fptq::ReleaseResourceEntry(major), fptq::kUnknownEntry);
  }
}

int main(int argc, char** argv) { return harness::RunTests(argc > 1 ? argv[1] : ""); }
