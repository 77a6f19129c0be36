#include "cuda/emulation/faulty_kernels.h"
#include "cuda/launch.h"

namespace safegrad::test {
namespace {

using cuda::launch;

__global__ void mirror_kernel(const float* in, float* out, bool wait) {
  __shared__ float held[128];
  held[threadIdx.x] = in[threadIdx.x];
  if (wait) __syncthreads();
  out[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}

__global__ void leave_before_barrier_kernel() {
  if (threadIdx.x >= blockDim.x / 2) return;
  __syncthreads();
}

__global__ void different_barriers_kernel() {
  if (threadIdx.x < blockDim.x / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void leave_before_shuffle_kernel() {
  if (threadIdx.x == 0) return;
  __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
}

__global__ void unwritten_kernel(float* out) {
  __shared__ float held[128];
  out[threadIdx.x] = held[threadIdx.x];
  held[threadIdx.x] = 1.0f;
}

__global__ void overwrite_kernel(float* out) {
  *out = static_cast<float>(blockIdx.x);
}

}  // namespace

void mirror(const float* in, float* out, int threads) {
  launch("mirror", mirror_kernel, 1, threads, nullptr, in, out, true);
}
void mirror_without_barrier(const float* in, float* out, int threads) {
  launch("mirror", mirror_kernel, 1, threads, nullptr, in, out, false);
}
void leave_before_barrier(int threads) {
  launch("leave_before_barrier", leave_before_barrier_kernel, 1, threads, nullptr);
}
void wait_at_different_barriers(int threads) {
  launch("different_barriers", different_barriers_kernel, 1, threads, nullptr);
}
void leave_before_shuffle(int threads) {
  launch("leave_before_shuffle", leave_before_shuffle_kernel, 1, threads, nullptr);
}
void read_unwritten(float* out, int threads) {
  launch("unwritten", unwritten_kernel, 2, threads, nullptr, out);
}
void overwrite_each_other(float* out, int blocks) {
  launch("overwrite", overwrite_kernel, blocks, 1, nullptr, out);
}

}  // namespace safegrad::test
