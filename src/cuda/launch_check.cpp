#include "cuda/launch_check.h"

#include <cuda_runtime.h>

#include "core/error.h"

namespace safegrad::cuda {

void check_launch(const char* kernel, int code) {
  SAFEGRAD_CHECK(code == cudaSuccess, RunError, "CUDA kernel {} could not be launched: {}", kernel,
                 cudaGetErrorString(static_cast<cudaError_t>(code)));
}

void check_limit(const char* kernel, const char* what, int64_t got, int64_t limit) {
  SAFEGRAD_CHECK(got <= limit, UsageError, "CUDA kernel {}: {} {}, at most {} are supported",
                 kernel, got, what, limit);
}

}  // namespace safegrad::cuda
