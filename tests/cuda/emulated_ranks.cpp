// emulated_ranks.cpp: tests run on one rank whose kernels are the GPU's, emulated.
#include "cpu/cpu_backend.h"
#include "cuda/any_order.h"
#include "dist/rank_main.h"
#include "dist/solo_communicator.h"

namespace safegrad::testing {
namespace {

/// The host's memory and clock, and the sources of src/cuda for every kernel but attention.
class EmulatedGpu final : public Backend {
 public:
  at::Device device() const override { return at::kCPU; }
  std::string name() const override { return "emulated GPU"; }
  const Kernels& kernels() const override { return test::kernels(); }
  at::Tensor upload(const at::Tensor& host) const override { return host; }
  std::unique_ptr<Stopwatch> make_stopwatch(size_t phases) const override {
    return cpu_backend().make_stopwatch(phases);
  }
  double measure_gemm_rate(at::ScalarType dtype) const override {
    return cpu_backend().measure_gemm_rate(dtype);
  }
  int64_t take_peak_bytes() const override { return 0; }
  int64_t peak_bytes() const override { return cpu_backend().peak_bytes(); }
};

}  // namespace

std::string start_ranks(int*, char***) {
  return "";
}

void stop_ranks() {}

std::unique_ptr<dist::Communicator> world() {
  return std::make_unique<dist::SoloCommunicator>();
}

const Backend& backend() {
  static const EmulatedGpu instance;
  return instance;
}

}  // namespace safegrad::testing
