#include "core/gemm_rate.h"

#include <algorithm>
#include <chrono>

#include <ATen/ATen.h>

namespace safegrad {

double measure_gemm_rate(ComputeDtype dtype) {
  constexpr int64_t kSize = 1024;
  const auto type = dtype == ComputeDtype::bfloat16 ? at::kBFloat16 : at::kFloat;
  const at::Tensor a = at::ones({kSize, kSize}, type), b = at::ones({kSize, kSize}, type);
  at::Tensor c = at::empty({kSize, kSize}, type);
  const auto start = std::chrono::steady_clock::now();
  double best = 1e300, elapsed = 0;
  while (elapsed < 0.5) {
    const auto begin = std::chrono::steady_clock::now();
    at::mm_out(c, a, b);
    const auto end = std::chrono::steady_clock::now();
    best = std::min(best, std::chrono::duration<double>(end - begin).count());
    elapsed = std::chrono::duration<double>(end - start).count();
  }
  return 2.0 * kSize * kSize * kSize / best;
}

}  // namespace safegrad
