// faulty_kernels.h: small kernels, most with a mistake that the emulation must find.
#pragma once
#include "cuda/kernels.h"

namespace safegrad::test {

/// Launches one block of `threads`.
/// out[i] = in[threads - 1 - i] through shared memory.
void mirror(const float* in, float* out, int threads);
/// The same without the barrier between writing and reading.
void mirror_without_barrier(const float* in, float* out, int threads);
/// Half of the block waits at a barrier, the other half returns.
void leave_before_barrier(int threads);
/// Both halves wait, each at a barrier of its own.
void wait_at_different_barriers(int threads);
/// Lane 0 of a warp misses a shuffle.
void leave_before_shuffle(int threads);
/// Reads shared memory that nobody wrote.
void read_unwritten(float* out, int threads);
/// Blocks that all add to one element: counts[0] ends as the last block's number.
void overwrite_each_other(float* out, int blocks);

}  // namespace safegrad::test
