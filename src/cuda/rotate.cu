// rotate.cu: rotary position embedding in place.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace safegrad::cuda {
namespace {

constexpr int kMaxThreads = 256;

// One block a token: its heads share the row of cosines, which stays in the first-level cache.
template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads)
    rotate_kernel(T* __restrict__ x, int64_t stride, const int64_t* __restrict__ positions,
                  const float* __restrict__ cosine, const float* __restrict__ sine, float sign,
                  int heads, int half) {
  T* token = x + static_cast<int64_t>(blockIdx.x) * stride;
  const int64_t row = positions[blockIdx.x] * half;
  const int packs_a_head = half / N, end = heads * packs_a_head;
  for (int p = static_cast<int>(threadIdx.x); p < end; p += static_cast<int>(blockDim.x)) {
    const int head = p / packs_a_head, column = (p - head * packs_a_head) * N;
    T* low = token + head * 2 * half + column;
    float a[N], b[N], c[N], s[N];
    load(low, a);
    load(low + half, b);
    load(cosine + row + column, c);
    load(sine + row + column, s);
#pragma unroll
    for (int i = 0; i < N; ++i) rotate_pair(a[i], b[i], c[i], sign * s[i]);
    store(low, a);
    store(low + half, b);
  }
}

template <typename T, int N>
void rotate(Rows x, const int64_t* positions, const float* cosine, const float* sine, bool inverse,
            int64_t tokens, int64_t heads, int64_t width, Stream stream) {
  const int64_t half = width / 2, accesses = heads * half / N;
  launch("rotate", rotate_kernel<T, N>, accesses == 0 ? 0 : tokens,
         std::min<int64_t>(kMaxThreads, ceil_div(accesses, kWarp) * kWarp), stream,
         static_cast<T*>(x.data), x.stride, positions, cosine, sine, inverse ? -1.0f : 1.0f,
         static_cast<int>(heads), static_cast<int>(half));
}

}  // namespace

void rotate(Element element, Rows x, const int64_t* positions, const float* cosine,
            const float* sine, bool inverse, int64_t tokens, int64_t heads, int64_t width,
            Stream stream) {
  by_element(element, [&]<typename T>() {
    constexpr int N = kPack<T>;
    if (packs<T, N>({x.data}, {x.stride, width / 2}) && packs<float, N>({cosine, sine}, {})) {
      rotate<T, N>(x, positions, cosine, sine, inverse, tokens, heads, width, stream);
    } else {
      rotate<T, 1>(x, positions, cosine, sine, inverse, tokens, heads, width, stream);
    }
  });
}

}  // namespace safegrad::cuda
