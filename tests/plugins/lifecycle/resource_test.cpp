// What plugins share in a process: the properties of its GPUs, held through TensorRT's registry, which is
// played here by a table of functions as both major versions lay it out.
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "device_resource.h"
#include "harness.h"
#include "kernels_double.h"
#include "registry_abi.h"

namespace {

// As TensorRT's: clones the first resource of a key, counts holds, releases and deletes with the last.
struct FakeRegistry {
  void** table = entries;  // where an object with virtual functions has it
  void* entries[24] = {};
  struct Entry {
    std::unique_ptr<nvinfer1::IPluginResource> resource;
    int32_t holds = 0;
  };
  std::map<std::string, Entry> resources;
  bool refuses = false;

  explicit FakeRegistry(int32_t major) {
    for (void*& entry : entries) entry = reinterpret_cast<void*>(&Wrong);
    entries[fptq::AcquireResourceEntry(major)] = reinterpret_cast<void*>(&Acquire);
    entries[fptq::ReleaseResourceEntry(major)] = reinterpret_cast<void*>(&Release);
  }

  static int32_t Wrong() {
    harness::Fail(__FILE__, __LINE__, "another entry of the registry was called");
    return 1;
  }

  static nvinfer1::IPluginResource* Acquire(FakeRegistry* self, const char* key,
                                            nvinfer1::IPluginResource* resource) {
    if (self->refuses) return nullptr;
    Entry& entry = self->resources[key];
    if (entry.resource == nullptr) entry.resource.reset(resource->clone());
    ++entry.holds;
    return entry.resource.get();
  }

  static int32_t Release(FakeRegistry* self, const char* key) {
    const auto found = self->resources.find(key);
    if (found == self->resources.end()) return 1;
    if (--found->second.holds > 0) return 0;
    const int32_t status = found->second.resource->release();
    self->resources.erase(found);
    return status;
  }
};

fptq::Registry RegistryOf(FakeRegistry* fake, int32_t major) {
  return {reinterpret_cast<nvinfer1::IPluginRegistry*>(fake), major};
}

struct WithGpus {
  WithGpus() {
    ResetDouble();
    TheDouble().device_status = FPTQ_OK;
  }
  ~WithGpus() { ResetDouble(); }
};

FptqDevice Ask(const fptq::SharedDevices& devices) {
  FptqDevice device{};
  EXPECT_EQ(devices.Current(&device), FPTQ_OK);
  return device;
}

}  // namespace

TEST(PluginsOfAProcessAskForADeviceOnce) {
  for (int32_t major : {10, 11, 1}) {
    WithGpus gpus;
    FakeRegistry fake(major);
    fptq::SharedDevices first, second;
    first.Acquire(RegistryOf(&fake, major));
    second.Acquire(RegistryOf(&fake, major));
    EXPECT(first.IsHeld() && second.IsHeld());
    const FptqDevice a = Ask(first), b = Ask(second);
    EXPECT_EQ(TheDouble().times_asked.load(), 1);
    for (const FptqDevice& device : {a, b}) {
      EXPECT_EQ(device.compute_capability, 80);
      EXPECT_EQ(device.multiprocessors, 108);
      EXPECT_EQ(device.shared_memory_bytes, 166912);
    }
  }
}

TEST(EachDeviceHasItsOwnProperties) {
  WithGpus gpus;
  FakeRegistry fake(10);
  fptq::SharedDevices devices;
  devices.Acquire(RegistryOf(&fake, 10));
  for (int32_t round = 0; round < 2; ++round) {
    for (int32_t ordinal : {0, 1, 63, 64, 1000}) {
      TheDouble().ordinal = ordinal;
      EXPECT_EQ(Ask(devices).multiprocessors, 108 + ordinal);
    }
  }
  EXPECT_EQ(TheDouble().times_asked.load(), 3 + 2 * 2);  // those beyond the table are asked each time
}

TEST(TheLastHoldFreesTheResource) {
  WithGpus gpus;
  FakeRegistry fake(10);
  {
    fptq::SharedDevices first;
    first.Acquire(RegistryOf(&fake, 10));
    first.Acquire(RegistryOf(&fake, 10));  // one hold each, however often it is asked for
    {
      fptq::SharedDevices second;
      second.Acquire(RegistryOf(&fake, 10));
      fptq::SharedDevices copy(first);
      EXPECT(!copy.IsHeld());
      EXPECT_EQ(fake.resources.begin()->second.holds, 2);
    }
    EXPECT_EQ(fake.resources.size(), size_t{1});
    Ask(first);
  }
  EXPECT_EQ(fake.resources.size(), size_t{0});
}

TEST(WithoutASharedResourceEachPluginAsksItself) {
  WithGpus gpus;
  FakeRegistry fake(10);
  fake.refuses = true;
  for (const fptq::Registry& registry : {fptq::Registry{}, RegistryOf(&fake, 12), RegistryOf(&fake, 10)}) {
    fptq::SharedDevices devices;
    devices.Acquire(registry);
    EXPECT(!devices.IsHeld());
    EXPECT_EQ(Ask(devices).multiprocessors, 108);
  }
  EXPECT_EQ(TheDouble().times_asked.load(), 3);
}

TEST(AnErrorIsNotRemembered) {
  WithGpus gpus;
  FakeRegistry fake(10);
  fptq::SharedDevices devices;
  devices.Acquire(RegistryOf(&fake, 10));
  FptqDevice device{};
  TheDouble().properties_status = FPTQ_CUDA_ERROR;
  EXPECT_EQ(devices.Current(&device), FPTQ_CUDA_ERROR);
  TheDouble().properties_status = FPTQ_OK;
  EXPECT_EQ(devices.Current(&device), FPTQ_OK);
  TheDouble().device_status = FPTQ_UNSUPPORTED_DEVICE;
  EXPECT_EQ(devices.Current(&device), FPTQ_UNSUPPORTED_DEVICE);
  EXPECT_EQ(devices.Current(nullptr), FPTQ_NULL_POINTER);
}

TEST(ThreadsThatAskAtOnceGetTheSame) {
  WithGpus gpus;
  FakeRegistry fake(10);
  fptq::SharedDevices devices;
  devices.Acquire(RegistryOf(&fake, 10));
  std::vector<int32_t> wrong(8, 0);
  std::vector<std::thread> threads;
  for (int32_t i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      for (int32_t round = 0; round < 1000; ++round) {
        FptqDevice device{};
        wrong[i] += devices.Current(&device) != FPTQ_OK || device.multiprocessors != 108;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t count : wrong) EXPECT_EQ(count, 0);
  EXPECT(TheDouble().times_asked.load() <= 8);
}
