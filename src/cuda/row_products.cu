// row_products.cu: inner products of the rows of two matrices, a warp a row.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace safegrad::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // of a block

// Lanes in a tree: the order depends on the width alone.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    row_products_kernel(const T* __restrict__ a, int64_t a_stride, const T* __restrict__ b,
                        int64_t b_stride, double scale, double* __restrict__ sums, int64_t rows,
                        int width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (row >= rows) return;  // a whole warp
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  double sum = 0;
  for (int j = lane * N; j < width; j += kWarp * N) {
    float x[N], y[N];
    load(a + row * a_stride + j, x);
    load(b + row * b_stride + j, y);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += gram_term(x[i], y[i]);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += shuffle_down(sum, offset);
  if (lane == 0) sums[row] += scale * sum;
}

}  // namespace

void add_row_products(Element element, ConstRows a, ConstRows b, double scale, double* sums,
                      int64_t rows, int64_t width, Stream stream) {
  by_element(element, [&]<typename T>() {
    const auto run = [&]<int N>() {
      launch("add_row_products", row_products_kernel<T, N>, ceil_div(rows, kRows), kThreads, stream,
             static_cast<const T*>(a.data), a.stride, static_cast<const T*>(b.data), b.stride,
             scale, sums, rows, static_cast<int>(width));
    };
    if (packs<T, kPack<T>>({a.data, b.data}, {a.stride, b.stride, width})) {
      run.template operator()<kPack<T>>();
    } else {
      run.template operator()<1>();
    }
  });
}

}  // namespace safegrad::cuda
