// cuda_module.h: the GPU part of the program, a library that is loaded only where a GPU is used.
#pragma once
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "dist/communicator.h"

namespace safegrad::dist {

/// What libsafegrad_cuda.so offers. So one program runs everywhere: LibTorch's CUDA libraries and
/// NCCL are needed where a GPU is used, not where the program starts.
class CudaModule {
 public:
  virtual ~CudaModule() = default;
  /// Makes `device` this process's GPU. `tf32`: float32 products may round their inputs to TF32.
  /// One a process. Throws RunError with CUDA's text.
  virtual std::unique_ptr<Backend> make_backend(int device, bool tf32) const = 0;
  /// NCCL between the ranks of `control`, each on its backend's GPU. Collective. Throws CommError,
  /// then or later, where the others are not there by the deadline.
  virtual std::unique_ptr<Communicator> make_world(std::unique_ptr<ControlPlane> control,
                                                   const Backend& backend,
                                                   std::chrono::milliseconds deadline) const = 0;
};

/// Where the module lies; empty where there is none.
std::string cuda_module_path();
/// True if the module lies where load_cuda_module looks: the build had CUDA.
bool has_cuda_module();
/// Loads it from the program's folder or ../lib, once. Throws ConfigError: not in this build, or
/// why the system could not load it.
const CudaModule& load_cuda_module();

/// The GPUs that the NVIDIA driver shows to this process (CUDA_VISIBLE_DEVICES counts), each as a
/// hash of its UUID; without the module. None without a driver.
std::vector<uint64_t> visible_gpus();

}  // namespace safegrad::dist
