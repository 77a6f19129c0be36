// dropout.cu: dropout whose draws depend on neither layout nor device.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace safegrad::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = DropoutDraw::kGroup;

// A thread takes the features of one call of the generator: N at a time, one access or one element.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const T* __restrict__ x, const int64_t* __restrict__ keys,
                   const int64_t* __restrict__ positions, uint64_t site, DropoutDraw draw,
                   T* __restrict__ y, int width, int blocks_a_row) {
  const auto blocks = static_cast<unsigned>(blocks_a_row);
  const unsigned row = blockIdx.x / blocks;
  const unsigned group = (blockIdx.x - row * blocks) * kThreads + threadIdx.x;
  const int begin = static_cast<int>(group) * kGroup;
  if (begin >= width) return;
  const RandomBits bits = DropoutDraw::bits(static_cast<uint64_t>(keys[row]), site,
                                            static_cast<uint64_t>(positions[row]), group);
  const int64_t first = static_cast<int64_t>(row) * width + begin;
#pragma unroll
  for (int p = 0; p < kGroup; p += N) {
    if (begin + p >= width) break;
    float v[N];
    load(x + first + p, v);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= draw.scale(bits, p + i);
    store(y + first + p, v);
  }
}

}  // namespace

void dropout(Element element, const void* x, const int64_t* keys, const int64_t* positions,
             uint64_t site, DropoutDraw draw, void* y, int64_t rows, int64_t width, Stream stream) {
  by_element(element, [&]<typename T>() {
    const int64_t blocks = ceil_div(width, kGroup * kThreads);
    const auto run = [&]<int N>() {
      launch("dropout", dropout_kernel<T, N>, rows * blocks, kThreads, stream,
             static_cast<const T*>(x), keys, positions, site, draw, static_cast<T*>(y),
             static_cast<int>(width), static_cast<int>(blocks));
    };
    if (packs<T, kPack<T>>({x, y}, {width})) {
      run.template operator()<kPack<T>>();
    } else {
      run.template operator()<1>();
    }
  });
}

}  // namespace safegrad::cuda
