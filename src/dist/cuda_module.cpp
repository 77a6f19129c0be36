#include "dist/cuda_module.h"

#include <filesystem>
#include <vector>

#include <dlfcn.h>

#include "core/error.h"

namespace safegrad::dist {
namespace {

constexpr const char* kModule = "libsafegrad_cuda.so";

// Beside the program as it is built, or in ../lib as it is installed; tests lie a folder below.
std::filesystem::path find_module() {
  const auto folder = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  for (const char* place : {".", "../lib", ".."}) {
    const auto path = (folder / place / kModule).lexically_normal();
    if (std::filesystem::exists(path)) return path;
  }
  return {};
}

}  // namespace

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

int visible_gpus() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) return 0;
  const auto initialise = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto count_devices = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  int count = 0;
  const bool works =
      initialise && count_devices && initialise(0) == 0 && count_devices(&count) == 0;
  return works ? count : 0;
}

}  // namespace safegrad::dist
