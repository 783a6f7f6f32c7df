#include "fptq_run/single_call.h"

#include <algorithm>
#include <chrono>
#include <map>

#include "fptq_run/error.h"
#include "fptq_run/model.h"

namespace fptq_run {
namespace {

const HostTensor* Find(const NamedTensors& tensors, const std::string& name) {
  const auto found =
      std::find_if(tensors.begin(), tensors.end(), [&](const auto& pair) { return pair.first == name; });
  return found == tensors.end() ? nullptr : &found->second;
}

void CheckNamesAndTypes(const Engine& engine, const NamedTensors& inputs) {
  for (const auto& [name, tensor] : inputs) {
    const TensorInfo* known = FindTensor(engine, name);
    if (known == nullptr || !known->is_input) throw Error(name, "is no input of this engine");
    if (known->type != tensor.type) {
      throw Error(name, "is " + NameOf(tensor.type) + ", and the engine takes " + NameOf(known->type));
    }
    if (known->shape.size() != tensor.shape.size()) {
      throw Error(name, "is " + TextOf(tensor.shape) + ", and the engine takes " +
                            std::to_string(known->shape.size()) + " dimensions");
    }
  }
  for (const TensorInfo& known : engine.Tensors()) {
    if (known.is_input && Find(inputs, known.name) == nullptr)
      throw Error(known.name, "is missing among the inputs");
  }
}

// Throws Error with the first misfit of the first profile where no profile allows the shapes.
int ProfileFor(const Engine& engine, const NamedTensors& inputs) {
  std::string misfit;
  for (int profile = 0; profile < engine.ProfileCount(); ++profile) {
    bool fits = true;
    for (const auto& [name, tensor] : inputs) {
      const Range& range = FindTensor(engine, name)->ranges[static_cast<std::size_t>(profile)];
      if (Fits(range, tensor.shape)) continue;
      fits = false;
      if (misfit.empty()) {
        misfit = name + " is " + TextOf(tensor.shape) + ", and the engine takes " + TextOf(range.minimum) +
                 " to " + TextOf(range.maximum);
      }
    }
    if (fits) return profile;
  }
  throw Error("inputs", misfit, "stay within the profile, or build the engine with a larger one");
}

}  // namespace

IterationResult RunOnce(Device& device, Engine& engine, const NamedTensors& inputs) {
  CheckNamesAndTypes(engine, inputs);
  const std::unique_ptr<Context> context = engine.CreateContext(ProfileFor(engine, inputs));
  const bool is_static = FindTensor(engine, "write_indices") != nullptr;
  std::map<std::string, DeviceBuffer> buffers;
  for (const auto& [name, tensor] : inputs) {
    const DeviceBuffer& buffer =
        buffers.emplace(name, DeviceBuffer(device, tensor.data.size())).first->second;
    context->SetInputShape(name, tensor.shape);
    context->SetAddress(name, buffer.address());
    device.CopyToDevice(buffer.address(), tensor.data.data(), tensor.data.size());
  }
  IterationResult result;
  for (const TensorInfo& tensor : engine.Tensors()) {
    if (tensor.is_input) continue;
    result.outputs.emplace_back(tensor.name,
                                HostTensor::Zeros(tensor.type, context->OutputShape(tensor.name)));
    const bool in_place = is_static && !PastOf(tensor.name).empty();
    const std::string owner = in_place ? PastOf(tensor.name) : tensor.name;
    if (!in_place) buffers.emplace(owner, DeviceBuffer(device, result.outputs.back().second.data.size()));
    context->SetAddress(tensor.name, buffers.at(owner).address());
  }
  device.Synchronize();
  const auto start = std::chrono::steady_clock::now();
  context->Enqueue();
  device.Synchronize();
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (auto& [name, tensor] : result.outputs) {
    const bool in_place = is_static && !PastOf(name).empty();
    const std::string owner = in_place ? PastOf(name) : name;
    device.CopyToHost(tensor.data.data(), buffers.at(owner).address(), tensor.data.size());
  }
  device.Synchronize();
  return result;
}

}  // namespace fptq_run
