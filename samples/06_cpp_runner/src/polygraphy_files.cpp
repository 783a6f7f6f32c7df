#include "fptq_run/polygraphy_files.h"

#include <cstring>
#include <filesystem>
#include <fstream>

#include "fptq_run/error.h"
#include "json.h"

namespace fptq_run {
namespace {

constexpr const char* kClass = "polygraphy_class";
constexpr int kIndent = 4;
constexpr const char* kFileHint = "write it with polygraphy run --save-inputs, or fptq-export diff --save-io";

Json JsonFromTensor(const HostTensor& tensor) {
  return {{"array", Base64FromBytes(NpyFromTensor(tensor))}, {kClass, "ndarray"}};
}

HostTensor TensorFromJson(const Json& json, const std::string& where) {
  if (!json.is_object() || !json.contains("array") || !json["array"].is_string()) {
    const bool torch = json.is_object() && json.contains("tensor");
    throw Error(where,
                torch ? "is a torch tensor, which only torch reads" : "is no array in Polygraphy's format",
                torch ? "save it as a NumPy array" : kFileHint);
  }
  return TensorFromNpy(BytesFromBase64(json["array"].get_ref<const std::string&>(), where), where);
}

NamedTensors CallFromJson(const Json& json, const std::string& where) {
  if (!json.is_object()) throw Error(where, "is no object with one array for each input", kFileHint);
  NamedTensors tensors;
  for (const auto& [name, value] : json.items()) {
    tensors.emplace_back(name, TensorFromJson(value, where + ": " + name));
  }
  return tensors;
}

std::string TextFrom(const Json& json) { return json.dump(kIndent, ' ', true); }

HostTensor WithNumpyType(const HostTensor& tensor) {
  if (tensor.type != DType::kBFloat16) return tensor;
  const std::vector<float> floats = FloatsFrom(tensor.data.data(), tensor.type, VolumeOf(tensor.shape));
  HostTensor wide = HostTensor::Zeros(DType::kFloat32, tensor.shape);
  if (!floats.empty()) std::memcpy(wide.data.data(), floats.data(), wide.data.size());
  return wide;
}

}  // namespace

std::vector<NamedTensors> LoadInputs(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Error(path, "cannot be opened");
  Json json;
  try {
    json = Json::parse(file);
  } catch (const Json::exception& error) {
    throw Error(path, std::string("is no JSON (") + error.what() + ")", kFileHint);
  }
  std::vector<NamedTensors> calls;
  if (json.is_object()) {
    calls.push_back(CallFromJson(json, path));
  } else if (json.is_array()) {
    for (const Json& call : json) calls.push_back(CallFromJson(call, path));
  }
  if (calls.empty()) throw Error(path, "has no inputs", kFileHint);
  return calls;
}

void SaveInputs(const std::string& path, const std::vector<NamedTensors>& calls) {
  Json list = Json::array();
  for (const NamedTensors& call : calls) {
    Json object = Json::object();
    for (const auto& [name, tensor] : call) object[name] = JsonFromTensor(WithNumpyType(tensor));
    list.push_back(std::move(object));
  }
  WriteFile(path, TextFrom(list));
}

void SaveOutputs(const std::string& path, const std::string& runner,
                 const std::vector<IterationResult>& results) {
  Json iterations = Json::array();
  for (const IterationResult& result : results) {
    Json outputs = Json::object();
    for (const auto& [name, tensor] : result.outputs) {
      outputs[name] = {{"values", JsonFromTensor(WithNumpyType(tensor))}, {kClass, "LazyArray"}};
    }
    iterations.push_back({{"outputs", std::move(outputs)},
                          {"runtime", result.seconds},
                          {"runner_name", runner},
                          {kClass, "IterationResult"}});
  }
  Json pair = Json::array({runner, std::move(iterations)});
  WriteFile(path, TextFrom(Json{{"lst", Json::array({std::move(pair)})}, {kClass, "RunResults"}}));
}

void WriteFile(const std::string& path, const std::string& text) {
  const std::string partial = path + ".partial";
  std::ofstream file(partial, std::ios::binary);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(partial, path, error);
  if (!file || error) {
    std::filesystem::remove(partial, error);
    throw Error(path, "cannot be written");
  }
}

}  // namespace fptq_run
