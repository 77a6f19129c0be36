// cuda_runtime.h: the part of the CUDA runtime that src/cuda uses, emulated on the CPU: the
// kernels' very sources are compiled as C++ with this folder first in the include path, and run in
// tests.
//
// Blocks run one after the other; the threads of a block are fibers that switch where they wait for
// each other. What a GPU leaves undefined is an error here (std::logic_error from the launch):
// threads of a block that do not all reach the same barrier, lanes of a warp that do not all reach
// the same shuffle. Shared memory is filled with NaN before every block. Tests choose the order of
// threads and blocks: a result that depends on it is a race. For one host thread.
//
// Shared variables are thread_local, so that their addresses are known: kernels must be linked into
// a shared library that has no other thread_local variables.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

/// Writes one access, to memory of any type.
inline void __stwb(uint2* to, uint2 word) {
  std::memcpy(to, &word, sizeof word);
}
inline void __stwb(uint4* to, uint4 word) {
  std::memcpy(to, &word, sizeof word);
}

/// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
const char* cudaGetErrorString(cudaError_t code);

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

enum class Order { forward, reversed, shuffled };

/// Order in which threads (up to the next barrier) and blocks run, for launches from now on.
void set_order(Order threads, Order blocks);

/// Kernels launched so far in this process.
int64_t launches();

/// Runs `thread` once a thread of every block. `kernel`: any address of its library.
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& thread);

/// Waits for the block; returns when all its threads wait at the same place.
void wait_for_block(std::source_location place);

/// Waits for the 32 lanes of the warp, then returns `word` of lane `from`.
uint32_t exchange(uint32_t word, unsigned from, std::source_location place);

/// Number of the fiber in its warp.
unsigned lane();

/// Ends the launch with std::logic_error unless all lanes are named: the rest is not emulated.
void check_mask(unsigned mask);

template <typename T>
T shuffle(unsigned mask, T value, unsigned from, std::source_location place);

}  // namespace emulation

inline void __syncthreads(std::source_location place = std::source_location::current()) {
  emulation::wait_for_block(place);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                  std::source_location place = std::source_location::current()) {
  return emulation::shuffle(mask, value, emulation::lane() ^ static_cast<unsigned>(lane_mask),
                            place);
}

/// A lane without a partner keeps its own value, as on a GPU.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   std::source_location place = std::source_location::current()) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, value, lane + delta < 32 ? lane + delta : lane, place);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  // Converted once, then copied to every thread, as kernel parameters are.
  const auto convert = [&](Parameters... parameters) {
    return emulation::run(*config, reinterpret_cast<const void*>(kernel),
                          [&] { kernel(parameters...); });
  };
  return convert(std::forward<Arguments>(arguments)...);
}

namespace emulation {

template <typename T>
T shuffle(unsigned mask, T value, unsigned from, std::source_location place) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  check_mask(mask);
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  word = exchange(word, from, place);
  std::memcpy(&value, &word, sizeof word);
  return value;
}

}  // namespace emulation
