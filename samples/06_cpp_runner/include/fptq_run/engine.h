// A loaded engine as the runner needs it: TensorRT's, or a double.
#ifndef FPTQ_RUN_ENGINE_H
#define FPTQ_RUN_ENGINE_H

#include <memory>
#include <string>
#include <vector>

#include "fptq_run/device.h"
#include "fptq_run/tensor.h"

namespace fptq_run {

// Shapes that a profile allows for one input.
struct Range {
  Shape minimum;
  Shape maximum;
};

struct TensorInfo {
  std::string name;
  bool is_input = false;
  DType type = DType::kFloat32;
  Shape shape;                // -1 for a dynamic dimension
  std::vector<Range> ranges;  // of an input, by profile
};

// Shapes and addresses of calls under one optimization profile. Everything throws Error.
class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  virtual ~Context() = default;

  virtual void SetInputShape(const std::string& name, const Shape& shape) = 0;
  // Of an output, for the input shapes that are set.
  [[nodiscard]] virtual Shape OutputShape(const std::string& name) const = 0;
  virtual void SetAddress(const std::string& name, Address address) = 0;
  // Queues one call on the stream of the device.
  virtual void Enqueue() = 0;
};

class Engine {
 public:
  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() = default;

  // Inputs and outputs, in the order of the engine.
  [[nodiscard]] virtual const std::vector<TensorInfo>& Tensors() const = 0;
  [[nodiscard]] virtual int ProfileCount() const = 0;
  virtual std::unique_ptr<Context> CreateContext(int profile) = 0;
};

// The input or output of that name, null where there is none.
const TensorInfo* FindTensor(const Engine& engine, const std::string& name);

// Whether a shape is within a range.
bool Fits(const Range& range, const Shape& shape);

}  // namespace fptq_run

#endif  // FPTQ_RUN_ENGINE_H
