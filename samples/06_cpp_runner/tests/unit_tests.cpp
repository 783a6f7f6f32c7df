// What is not seen through the command: arithmetic against published values, ownership, and files written again.
//
//   fptq-run-tests                          the tests
//   fptq-run-tests double WORDS             fptq-run on the double
//   fptq-run-tests rewrite IN OUT           inputs of Polygraphy, read and written again
//   fptq-run-tests outputs IN OUT SECONDS   the same as outputs of a runner called "runner"
#include <cmath>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "fptq_run/device.h"
#include "fptq_run/error.h"
#include "fptq_run/polygraphy_files.h"
#include "fptq_run/sampling.h"
#include "fptq_run/tensor.h"
#include "harness.h"
#include "machine_double.h"
#include "sha256.h"

namespace fptq_run {
namespace {

std::string Sum(const std::string& text) {
  Sha256 sum;
  sum.Update(reinterpret_cast<const unsigned char*>(text.data()), text.size());
  return sum.Digest();
}

template <typename Function>
bool Throws(const Function& function) {
  try {
    function();
  } catch (const Error&) {
    return true;
  }
  return false;
}

// Vectors of FIPS 180-4 and of NIST's examples: one block, none, two, and many.
TEST(Sha256IsThatOfTheStandard) {
  EXPECT_EQ(Sum("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sum(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sum("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Sum(std::string(1000000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

// IEEE 754: one, largest, smallest normal, smallest subnormal, infinity, NaN.
TEST(HalfIsWidenedExactly) {
  EXPECT_EQ(FloatFromHalf(0x3C00), 1.0F);
  EXPECT_EQ(FloatFromHalf(0xFBFF), -65504.0F);
  EXPECT_EQ(FloatFromHalf(0x0400), 0x1p-14F);
  EXPECT_EQ(FloatFromHalf(0x8001), -0x1p-24F);
  EXPECT(std::isinf(FloatFromHalf(0x7C00)));
  EXPECT(std::isnan(FloatFromHalf(0x7E00)));
  EXPECT_EQ(FloatFromBFloat16(0x4049), 3.140625F);
}

// A buffer that is moved is freed once; one that is assigned over is freed too. The device aborts over a leak.
TEST(BuffersAreFreedOnce) {
  const std::unique_ptr<Device> device = DeviceDouble();
  DeviceBuffer first(*device, 8);
  DeviceBuffer second(*device, 16);
  first = std::move(second);
  const DeviceBuffer third(std::move(first));
  EXPECT_EQ(third.bytes(), 16U);
}

// Work that throws while it is captured leaves the stream as it was.
TEST(FailedCaptureEnds) {
  const std::unique_ptr<Device> device = DeviceDouble();
  const DeviceBuffer buffer(*device, 1);
  char value = 1;
  device->Zero(buffer.address(), 1);
  EXPECT(Throws([&] { device->Capture([] { throw Error("work", "fails"); }); }));
  device->CopyToHost(&value, buffer.address(), 1);
  device->Synchronize();
  EXPECT_EQ(static_cast<int>(value), 0);
}

TEST(DamagedArraysAreRefused) {
  EXPECT(Throws([] { BytesFromBase64("QUJ!", "array"); }));
  EXPECT(Throws([] { BytesFromBase64("QUJDR", "array"); }));
  EXPECT(Throws([] { TensorFromNpy("no array", "array"); }));
  const std::string npy = NpyFromTensor(HostTensor::FromIntegers(DType::kInt64, {3}, {1, 2, 3}));
  for (std::size_t size = 0; size < npy.size(); ++size) {
    EXPECT(Throws([&] { TensorFromNpy(npy.substr(0, size), "array"); }));
  }
  EXPECT(Throws([&] { TensorFromNpy(npy + "x", "array"); }));
}

// 2^32 x 2^32 elements are 0 bytes in arithmetic of 64 bits.
TEST(ShapesThatOverflowAreRefused) {
  std::string npy = NpyFromTensor(HostTensor::FromIntegers(DType::kInt64, {0, 1}, {}));
  const std::string shape = "(0, 1), }";
  const std::string huge = "(4294967296, 4294967296), }";
  npy.replace(npy.find(shape), huge.size(), huge);
  EXPECT(Throws([&] { TensorFromNpy(npy, "array"); }));
}

TEST(LogitsThatAreNoNumbersAreRefused) {
  Sampler sampler({}, 0);
  EXPECT(Throws([&] { sampler.Next({1.0F, std::nanf("")}); }));
  EXPECT(Throws([&] { sampler.Next({}); }));
  EXPECT_EQ(sampler.Next({1.0F, 3.0F, 3.0F}), 1);
}

}  // namespace
}  // namespace fptq_run

int main(int count, char** words) {
  using fptq_run::LoadInputs;
  if (count > 1 && std::strcmp(words[1], "double") == 0) {
    return fptq_run::RunCommand({words + 2, words + count}, *fptq_run::MachineDouble(), std::cout, std::cerr);
  }
  if (count == 4 && std::strcmp(words[1], "rewrite") == 0) {
    fptq_run::SaveInputs(words[3], LoadInputs(words[2]));
    return 0;
  }
  if (count == 5 && std::strcmp(words[1], "outputs") == 0) {
    std::vector<fptq_run::IterationResult> results;
    for (const fptq_run::NamedTensors& call : LoadInputs(words[2]))
      results.push_back({call, std::stod(words[4])});
    fptq_run::SaveOutputs(words[3], "runner", results);
    return 0;
  }
  return harness::RunTests(count > 1 ? words[1] : "");
}
