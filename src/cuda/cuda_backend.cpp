#include "cuda/cuda_backend.h"

#include <algorithm>
#include <chrono>

#include <ATen/ATen.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/attention.h"
#include "cuda/check.h"
#include "cuda/event_stopwatch.h"

namespace safegrad::cuda {
namespace {

class CudaBackend final : public Backend {
 public:
  CudaBackend(int device, bool tf32)
      : device_(at::kCUDA, static_cast<c10::DeviceIndex>(device)),
        kernels_([] { return c10::cuda::getCurrentCUDAStream().stream(); }) {
    check(cudaSetDevice(device), "cudaSetDevice");
    check(cudaGetDeviceProperties(&properties_, device), "cudaGetDeviceProperties");
    at::globalContext().lazyInitDevice(at::kCUDA);
    at::globalContext().setAllowTF32CuBLAS(tf32);
    at::globalContext().setAllowBF16ReductionCuBLAS(false);
    // Where a kernel is told to keep an order (attention's backward), LibTorch would otherwise also
    // fill every new tensor with NaN.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  }

  at::Device device() const override { return device_; }
  std::string name() const override { return properties_.name; }
  const Kernels& kernels() const override { return kernels_; }

  // From pinned memory, so that the host goes on; LibTorch keeps the pinned copy until it is read.
  at::Tensor upload(const at::Tensor& host) const override {
    return host.pin_memory().to(device_, /*non_blocking=*/true);
  }

  std::unique_ptr<Stopwatch> make_stopwatch(size_t phases) const override {
    return std::make_unique<EventStopwatch>(phases);
  }

  double measure_gemm_rate(at::ScalarType dtype) const override {
    const int64_t size = dtype == at::kBFloat16 ? 8192 : 4096;
    const auto options = at::TensorOptions().dtype(dtype).device(device_);
    const at::Tensor a = at::randn({size, size}, options), b = at::randn({size, size}, options);
    at::Tensor c = at::empty({size, size}, options);
    EventStopwatch watch(2);
    const auto start = std::chrono::steady_clock::now();
    double best = 1e300;
    while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(500)) {
      watch.enter(1);
      at::mm_out(c, a, b);
      watch.enter(0);
      check(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()), "cudaStreamSynchronize");
      best = std::min(best, watch.take()[1]);
    }
    const auto n = static_cast<double>(size);
    return 2.0 * n * n * n / best;
  }

  int64_t take_peak_bytes() const override {
    const int64_t peak = peak_bytes();
    c10::cuda::CUDACachingAllocator::resetPeakStats(device_.index());
    return peak;
  }

  int64_t peak_bytes() const override {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device_.index());
    return stats.allocated_bytes[0].peak;  // 0: of all pools together
  }

 private:
  at::Device device_;
  cudaDeviceProp properties_{};
  DeviceKernels kernels_;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(int device, bool tf32) {
  return std::make_unique<CudaBackend>(device, tf32);
}

}  // namespace safegrad::cuda
