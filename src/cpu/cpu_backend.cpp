#include "cpu/cpu_backend.h"

#include <algorithm>
#include <chrono>

#include <ATen/ATen.h>

#include "core/machine_memory.h"
#include "cpu/cpu_kernels.h"

namespace safegrad {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

class WallStopwatch final : public Stopwatch {
 public:
  explicit WallStopwatch(size_t phases) : seconds_(phases, 0.0) {}

  void enter(size_t phase) override {
    const auto now = Clock::now();
    seconds_[phase_] += seconds_between(since_, now);
    since_ = now;
    phase_ = phase;
  }

  std::vector<double> take() override {
    enter(phase_);
    return std::exchange(seconds_, std::vector<double>(seconds_.size(), 0.0));
  }

 private:
  std::vector<double> seconds_;
  Clock::time_point since_ = Clock::now();
  size_t phase_ = 0;
};

class CpuBackend final : public Backend {
 public:
  at::Device device() const override { return at::kCPU; }
  std::string name() const override { return "cpu"; }
  const Kernels& kernels() const override { return cpu_kernels(); }
  at::Tensor upload(const at::Tensor& host) const override { return host; }
  std::unique_ptr<Stopwatch> make_stopwatch(size_t phases) const override {
    return std::make_unique<WallStopwatch>(phases);
  }
  double measure_gemm_rate(at::ScalarType dtype) const override {
    constexpr int64_t kSize = 1024;
    const at::Tensor a = at::ones({kSize, kSize}, dtype), b = at::ones({kSize, kSize}, dtype);
    at::Tensor c = at::empty({kSize, kSize}, dtype);
    const auto start = Clock::now();
    double best = 1e300, elapsed = 0;
    while (elapsed < 0.5) {
      const auto begin = Clock::now();
      at::mm_out(c, a, b);
      const auto end = Clock::now();
      best = std::min(best, seconds_between(begin, end));
      elapsed = seconds_between(start, end);
    }
    return 2.0 * kSize * kSize * kSize / best;
  }
  int64_t take_peak_bytes() const override { return 0; }
  int64_t peak_bytes() const override { return peak_resident_bytes(""); }
};

}  // namespace

const Backend& cpu_backend() {
  static const CpuBackend backend;
  return backend;
}

}  // namespace safegrad
