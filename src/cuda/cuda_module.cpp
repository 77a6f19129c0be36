// cuda_module.cpp: the one symbol that the program looks up in this library.
#include "dist/cuda_module.h"

#include "cuda/cuda_backend.h"
#include "cuda/nccl_communicator.h"

namespace safegrad::cuda {
namespace {

class Module final : public dist::CudaModule {
 public:
  std::unique_ptr<Backend> make_backend(int device, bool tf32) const override {
    return make_cuda_backend(device, tf32);
  }
  std::unique_ptr<dist::Communicator> make_world(
      std::unique_ptr<dist::ControlPlane> control, const Backend& backend,
      std::chrono::milliseconds deadline) const override {
    return make_nccl_world(std::move(control), backend.device().index(), {deadline});
  }
};

}  // namespace
}  // namespace safegrad::cuda

extern "C" __attribute__((visibility("default"))) const safegrad::dist::CudaModule&
safegrad_cuda_module() {
  static const safegrad::cuda::Module module;
  return module;
}
