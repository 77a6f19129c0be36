// launch_check.h: what a launch returned, as an error; for the compiler of the host and nvcc alike.
#pragma once
#include <cstdint>

namespace safegrad::cuda {

/// Throws RunError naming the kernel and CUDA's text unless `code` is cudaSuccess.
void check_launch(const char* kernel, int code);

/// Throws UsageError unless got <= limit: `what` of `kernel`, "got" and "at most".
void check_limit(const char* kernel, const char* what, int64_t got, int64_t limit);

}  // namespace safegrad::cuda
