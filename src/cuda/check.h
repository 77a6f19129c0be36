// check.h: what a call of the CUDA runtime returned, as an error.
#pragma once
#include <cuda_runtime_api.h>

#include "core/error.h"

namespace safegrad::cuda {

/// Throws RunError: the operation, and CUDA's text.
inline void check(cudaError_t code, const char* operation) {
  SAFEGRAD_CHECK(code == cudaSuccess, RunError, "{}: {} ({})", operation, cudaGetErrorString(code),
                 cudaGetErrorName(code));
}

}  // namespace safegrad::cuda
