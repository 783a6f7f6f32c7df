// The files of `polygraphy run`: --load-inputs, --save-inputs, --load-outputs, --save-outputs.
//
// A tensor is an .npy file (format 1.0, as NumPy 2 writes it) in base64. What is written equals what Polygraphy
// writes for the same arrays, byte by byte.
#ifndef FPTQ_RUN_POLYGRAPHY_FILES_H
#define FPTQ_RUN_POLYGRAPHY_FILES_H

#include <string>
#include <utility>
#include <vector>

#include "fptq_run/tensor.h"

namespace fptq_run {

// Tensors of one call, by name, in the order of the file.
using NamedTensors = std::vector<std::pair<std::string, HostTensor>>;

// What one call gave.
struct IterationResult {
  NamedTensors outputs;
  double seconds = 0.0;
};

// The calls in a file of `--load-inputs`: a list of objects, or one. Throws Error.
std::vector<NamedTensors> LoadInputs(const std::string& path);
// As `--save-inputs` writes them. Throws Error.
void SaveInputs(const std::string& path, const std::vector<NamedTensors>& calls);
// As `--save-outputs` writes them, of one runner. BF16, which NumPy does not have, becomes FP32. Throws Error.
void SaveOutputs(const std::string& path, const std::string& runner,
                 const std::vector<IterationResult>& results);

// One array in the .npy format, and back. `where` names it in errors.
std::string NpyFromTensor(const HostTensor& tensor);
HostTensor TensorFromNpy(const std::string& npy, const std::string& where);

std::string Base64FromBytes(const std::string& bytes);
std::string BytesFromBase64(const std::string& text, const std::string& where);

// Writes a file under another name and renames it. Throws Error.
void WriteFile(const std::string& path, const std::string& text);

}  // namespace fptq_run

#endif  // FPTQ_RUN_POLYGRAPHY_FILES_H
