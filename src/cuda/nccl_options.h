// nccl_options.h: what can be chosen about NCCL.
#pragma once
#include <chrono>

namespace safegrad::cuda {

struct NcclOptions {
  /// How long a rank waits for the others: to connect, to enqueue, and for a step's scalars.
  std::chrono::milliseconds deadline = std::chrono::minutes(10);
};

}  // namespace safegrad::cuda
