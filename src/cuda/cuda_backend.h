// cuda_backend.h: one GPU as this rank's device.
#pragma once
#include <memory>

#include "core/backend.h"

namespace safegrad::cuda {

/// Makes `device` the process's current GPU and sets LibTorch's switches: float32 products are full
/// float32 unless `tf32`; bfloat16 products add up in float32. Work is enqueued on LibTorch's
/// current stream; only measure_gemm_rate waits for it. Throws RunError with CUDA's text.
std::unique_ptr<Backend> make_cuda_backend(int device, bool tf32);

}  // namespace safegrad::cuda
