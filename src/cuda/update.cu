// update.cu: what happens on a shard after the reduction: inner products of gradients, AdamW.
#include <algorithm>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace safegrad::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSumThreads = 512;
constexpr int64_t kGramChunk = 1 << 14;    // elements of a partial sum: one block
constexpr int64_t kUpdateChunk = 1 << 11;  // elements of a block
constexpr int kUpdatePack = 4;
constexpr int kMaxRanges = 64;  // of a launch: they travel with its arguments

SAFEGRAD_HOST_DEVICE constexpr int pairs(int count) {
  return count * (count + 1) / 2;
}

template <int K>
struct GramSums {
  double pair[pairs(K)];  // (i, j), i <= j, row by row
};

template <int K>
struct Gradients {
  const float* at[K];
};

template <int K, int N>
__global__ void __launch_bounds__(kThreads, 1)
    gram_kernel(Gradients<K> gradients, int64_t size, double* __restrict__ partials) {
  __shared__ GramSums<K> slots[kMaxWarps];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kGramChunk;
  const int64_t end = begin + kGramChunk < size ? begin + kGramChunk : size;
  GramSums<K> sums = {};
#pragma unroll 4
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * N; i < end; i += kThreads * N) {
    float g[K][N] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (i + N <= end) {
        load(gradients.at[k] + i, g[k]);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (i + e < end) g[k][e] = gradients.at[k][i + e];
        }
      }
    }
    int pair = 0;
#pragma unroll
    for (int a = 0; a < K; ++a) {
#pragma unroll
      for (int b = a; b < K; ++b, ++pair) {
#pragma unroll
        for (int e = 0; e < N; ++e) sums.pair[pair] += gram_term(g[a][e], g[b][e]);
      }
    }
  }
  sums = block_merge(sums, slots, [](GramSums<K>& a, const GramSums<K>& b) {
#pragma unroll
    for (int p = 0; p < pairs(K); ++p) a.pair[p] += b.pair[p];
  });
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int p = 0; p < pairs(K); ++p) {
    partials[static_cast<int64_t>(blockIdx.x) * pairs(K) + p] = sums.pair[p];
  }
}

// Σ_i partials[i * width + column] in a fixed order; the result is thread 0's alone.
__device__ double sum_in_order(const double* partials, int64_t n, int width, int column) {
  __shared__ double slots[kMaxWarps];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += partials[i * width + column];
  return block_merge(sum, slots, [](double& a, double b) { a += b; });
}

__global__ void __launch_bounds__(kSumThreads)
    add_in_order_kernel(const double* __restrict__ partials, int64_t n, double* __restrict__ sum) {
  const double total = sum_in_order(partials, n, 1, 0);
  if (threadIdx.x == 0) *sum += total;
}

// One block a pair of gradients: both halves of the symmetric matrix.
__global__ void __launch_bounds__(kSumThreads)
    add_gram_kernel(const double* __restrict__ partials, int64_t n, int count,
                    double* __restrict__ gram) {
  const double total = sum_in_order(partials, n, pairs(count), static_cast<int>(blockIdx.x));
  if (threadIdx.x != 0) return;
  int row = 0, column = static_cast<int>(blockIdx.x);
  for (; column >= count - row; ++row) column -= count - row;
  column += row;
  gram[row * count + column] += total;
  if (row != column) gram[column * count + row] += total;
}

struct Ranges {
  Range range[kMaxRanges];
  int64_t first_block[kMaxRanges];
  int count;
};

// As store(), in one access: nvcc 13.0 splits plain stores of this kernel into their elements.
template <typename T, int N>
__device__ void store_whole(T* to, const float (&from)[N]) {
  if constexpr (N == 1) {
    store(to, from);
  } else {
    using Word = std::conditional_t<sizeof(Pack<T, N>) == 8, uint2, uint4>;
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.element[i] = static_cast<T>(from[i]);
    Word word;
    static_assert(sizeof word == sizeof pack);
    std::memcpy(&word, &pack, sizeof word);
    __stwb(reinterpret_cast<Word*>(to), word);
  }
}

template <typename C, int N>
__device__ void update_pack(const UpdateArguments& a, const AdamW& adamw, int64_t i) {
  float g[N] = {}, p[N], m[N], v[N];
#pragma unroll
  for (int k = 0; k < kMaxGradients; ++k) {
    if (k >= a.count) break;
    float gk[N];
    load(a.gradients[k] + i, gk);
#pragma unroll
    for (int e = 0; e < N; ++e) g[e] += a.coefficients[k] * gk[e];
  }
  load(a.master + i, p);
  load(a.m + i, m);
  load(a.v + i, v);
#pragma unroll
  for (int e = 0; e < N; ++e) adamw(g[e], m[e], v[e], p[e]);
  store_whole(a.master + i, p);
  store_whole(a.m + i, m);
  store_whole(a.v + i, v);
  if (a.compute != nullptr) store_whole(static_cast<C*>(a.compute) + i, p);
}

// Chunks lie at multiples of their size, so that packs are aligned wherever a range begins; its
// ragged ends go element by element.
template <typename C, int N>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ UpdateArguments arguments, AdamW adamw,
                  const __grid_constant__ Ranges ranges) {
  const int64_t block = blockIdx.x;
  int low = 0, high = ranges.count;  // the last range that begins at or before the block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (ranges.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Range range = ranges.range[low];
  if (!range.decays) adamw.decay = 1.0f;
  const int64_t chunk = range.begin / kUpdateChunk + block - ranges.first_block[low];
  const int64_t first = chunk * kUpdateChunk, last = first + kUpdateChunk;
  for (int64_t i = first + static_cast<int64_t>(threadIdx.x) * N; i < last; i += kThreads * N) {
    if (range.begin <= i && i + N <= range.end) {
      update_pack<C, N>(arguments, adamw, i);
    } else {
      for (int64_t e = i; e < i + N; ++e) {
        if (range.begin <= e && e < range.end) update_pack<C, 1>(arguments, adamw, e);
      }
    }
  }
}

int64_t chunks(const Range& range) {
  return ceil_div(range.end, kUpdateChunk) - range.begin / kUpdateChunk;
}

bool aligned(const UpdateArguments& a) {
  for (int k = 0; k < a.count; ++k) {
    if (!packs<float, kUpdatePack>({a.gradients[k]}, {})) return false;
  }
  return packs<float, kUpdatePack>({a.master, a.m, a.v}, {}) &&
         (a.element == Element::f32 ? packs<float, kUpdatePack>({a.compute}, {})
                                    : packs<c10::BFloat16, kUpdatePack>({a.compute}, {}));
}

template <int K>
void inner_products(const float* const* gradients, int64_t size, double* partials, Stream stream) {
  Gradients<K> g;
  bool whole = true;
  for (int k = 0; k < K; ++k) {
    g.at[k] = gradients[k];
    whole = whole && packs<float, kPack<float>>({gradients[k]}, {});
  }
  launch("add_inner_products", whole ? gram_kernel<K, kPack<float>> : gram_kernel<K, 1>,
         ceil_div(size, kGramChunk), kThreads, stream, g, size, partials);
}

}  // namespace

void add_in_order(const double* partials, int64_t n, double* sum, Stream stream) {
  if (n == 0) return;
  launch("add_in_order", add_in_order_kernel, 1, kSumThreads, stream, partials, n, sum);
}

int64_t gram_partials(int count, int64_t size) {
  return ceil_div(size, kGramChunk) * pairs(count);
}

void add_inner_products(const float* const* gradients, int count, int64_t size, double* partials,
                        double* gram, Stream stream) {
  if (size == 0) return;
  switch (count) {
    case 1:
      inner_products<1>(gradients, size, partials, stream);
      break;
    case 2:
      inner_products<2>(gradients, size, partials, stream);
      break;
    case 3:
      inner_products<3>(gradients, size, partials, stream);
      break;
    case 4:
      inner_products<4>(gradients, size, partials, stream);
      break;
    default:
      check_limit("add_inner_products", "gradients", count, kMaxGradients);
  }
  launch("add_gram", add_gram_kernel, pairs(count), kSumThreads, stream, partials,
         ceil_div(size, kGramChunk), count, gram);
}

void update(const UpdateArguments& arguments, const AdamW& adamw, const Range* ranges, int64_t n,
            Stream stream) {
  for (int64_t begin = 0; begin < n; begin += kMaxRanges) {
    Ranges batch = {};
    int64_t blocks = 0;
    for (int64_t i = begin; i < std::min(n, begin + kMaxRanges); ++i) {
      if (ranges[i].begin == ranges[i].end) continue;
      batch.range[batch.count] = ranges[i];
      batch.first_block[batch.count++] = blocks;
      blocks += chunks(ranges[i]);
    }
    by_element(arguments.element, [&]<typename C>() {
      launch("update", aligned(arguments) ? update_kernel<C, kUpdatePack> : update_kernel<C, 1>,
             blocks, kThreads, stream, arguments, adamw, batch);
    });
  }
}

}  // namespace safegrad::cuda
