// gpu_limits.h: which models the GPU's kernels take, for those who have no GPU at hand as well.
#pragma once
#include <cstdint>

namespace safegrad {

/// Widest row of the norms: they hold it in registers.
inline constexpr int64_t kWidestGpuNorm = 8192;
/// Attention's heads: multiples of kGpuHeadStep up to kWidestGpuHead.
inline constexpr int64_t kWidestGpuHead = 256;
inline constexpr int64_t kGpuHeadStep = 8;

/// Throw ModelError with what was got and what is taken.
void require_gpu_norms(int64_t width, int64_t head_dim);
void require_gpu_attention(int64_t head_dim);

}  // namespace safegrad
