// device.h: what the code of kernels shares: memory in accesses of up to 16 bytes, and sums over
// the threads of a block.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include <cuda_runtime.h>

namespace safegrad::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;  ///< of a block
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

/// N neighbouring elements: they move together, 16 bytes an access.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T element[N];
};

/// Elements of a 16-byte access.
template <typename T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <int N, typename T>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

/// The pack at `from` as floats.
template <int N, typename T>
__device__ void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = load<N>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = static_cast<float>(pack.element[i]);
}

template <int N, typename T>
__device__ void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.element[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

/// True if `strides` are multiples of N elements and `pointers` of the pack's alignment.
template <typename T, int N>
bool packs(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, N>) != 0) return false;
  }
  for (int64_t stride : strides) {
    if (stride % N != 0) return false;
  }
  return true;
}

/// The value of the lane `offset` above; of any type made of 32-bit words.
template <typename S>
__device__ S shuffle_down(const S& value, int offset) {
  constexpr int kWords = sizeof(S) / sizeof(uint32_t);
  static_assert(sizeof(S) % sizeof(uint32_t) == 0);
  uint32_t words[kWords];
  std::memcpy(words, &value, sizeof(S));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = __shfl_down_sync(kAllLanes, words[i], static_cast<unsigned>(offset));
  }
  S result;
  std::memcpy(&result, words, sizeof(S));
  return result;
}

/// Joins the values of a block's threads with merge(S&, const S&): lanes in a tree, then warps in
/// order. The result is thread 0's alone; `slots` are shared memory, one a warp. blockDim.x is a
/// multiple of 32.
template <typename S, typename Merge>
__device__ S block_merge(S value, S (&slots)[kMaxWarps], const Merge& merge) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) merge(value, shuffle_down(value, offset));
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) slots[warp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / kWarp; ++w) merge(value, slots[w]);
  }
  return value;
}

}  // namespace safegrad::cuda
