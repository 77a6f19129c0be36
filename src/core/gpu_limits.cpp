#include "core/gpu_limits.h"

#include <algorithm>

#include "core/error.h"

namespace safegrad {

void require_gpu_norms(int64_t width, int64_t head_dim) {
  SAFEGRAD_CHECK(std::max(width, head_dim) <= kWidestGpuNorm, ModelError,
                 "the model is {} wide; norms on a GPU take at most {}; set parallel.device: cpu",
                 width, kWidestGpuNorm);
}

void require_gpu_attention(int64_t head_dim) {
  SAFEGRAD_CHECK(
      head_dim % kGpuHeadStep == 0 && head_dim <= kWidestGpuHead, ModelError,
      "the model's head_dim is {}; attention on a GPU takes multiples of {} up to {}; set "
      "parallel.device: cpu",
      head_dim, kGpuHeadStep, kWidestGpuHead);
}

}  // namespace safegrad
