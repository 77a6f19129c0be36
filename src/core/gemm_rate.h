// gemm_rate.h: the matrix-product rate of this machine, the denominator of "speed of light" (design
// §2).
#pragma once
#include <cstdint>

#include "core/config.h"

namespace safegrad {

/// Floating-point operations per second of a large square product in `dtype` with this process's
/// threads: the best of several runs, about half a second in all. Ranks measure at the same time,
/// so that shared caches and clocks count as they do in training.
double measure_gemm_rate(ComputeDtype dtype);

}  // namespace safegrad
