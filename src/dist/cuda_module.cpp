#include "dist/cuda_module.h"

#include <filesystem>
#include <vector>

#include <dlfcn.h>

#include "core/error.h"
#include "core/random.h"

namespace safegrad::dist {
namespace {

constexpr const char* kModule = "libsafegrad_cuda.so";

// Beside the program as it is built, or in ../lib as it is installed.
std::filesystem::path find_module() {
  const auto folder = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  for (const char* place : {".", "../lib"}) {
    const auto path = (folder / place / kModule).lexically_normal();
    if (std::filesystem::exists(path)) return path;
  }
  return {};
}

}  // namespace

std::string cuda_module_path() {
  return find_module().string();
}

bool has_cuda_module() {
  return !find_module().empty();
}

const CudaModule& load_cuda_module() {
  static const CudaModule& module = []() -> const CudaModule& {
    const auto path = find_module();
    SAFEGRAD_CHECK(!path.empty(), ConfigError,
                   "parallel.device: cuda is not in this build ({} is not beside the program); "
                   "allowed: auto | cpu, or a build with SAFEGRAD_CUDA=ON",
                   kModule);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    SAFEGRAD_CHECK(library, ConfigError,
                   "parallel.device: {} cannot be loaded: {}; LibTorch's CUDA libraries are needed "
                   "(launch/setup --gpu installs them)",
                   path.string(), dlerror());
    using Entry = const CudaModule& (*)();
    const auto entry = reinterpret_cast<Entry>(dlsym(library, "safegrad_cuda_module"));
    SAFEGRAD_CHECK(entry, ConfigError, "parallel.device: {} is not of this program: {}",
                   path.string(), dlerror());
    return entry();
  }();
  return module;
}

// Through the driver's own library, which is there wherever a GPU is.
std::vector<uint64_t> visible_gpus() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) return {};
  struct Uuid {
    uint64_t words[2];
  };
  const auto initialise = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  const auto get = reinterpret_cast<int (*)(int*, int)>(dlsym(driver, "cuDeviceGet"));
  const auto uuid = reinterpret_cast<int (*)(Uuid*, int)>(dlsym(driver, "cuDeviceGetUuid_v2"));
  if (!initialise || !count || !get || !uuid || initialise(0) != 0) return {};
  int gpus = 0;
  if (count(&gpus) != 0) return {};
  std::vector<uint64_t> result;
  for (int i = 0; i < gpus; ++i) {
    int device = 0;
    Uuid id{};
    if (get(&device, i) == 0) uuid(&id, device);
    result.push_back(mix64(id.words[0], id.words[1]));
  }
  return result;
}

}  // namespace safegrad::dist
