// loss_rows.cu: losses of rows of logits: one sweep for the loss, one for the gradient in place.
#include <algorithm>

#include "core/loss_math.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace safegrad::cuda {
namespace {

// One block a row, large: few rows are then under way at once. The second sweep goes backwards: it
// begins with what the first one read last, of which the second-level cache holds the most.
constexpr int kMaxThreads = 1024;

// Last of first, first + step, ... below `width`; negative if there is none.
__device__ int last_column(int first, int width, int step) {
  return first < width ? first + (width - 1 - first) / step * step : -1;
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_kernel(T* __restrict__ logits, const int64_t* __restrict__ targets,
                         double* __restrict__ row_losses, int width) {
  __shared__ SoftmaxSums slots[kMaxWarps], whole;
  T* row = logits + static_cast<int64_t>(blockIdx.x) * width;
  const auto target = static_cast<int>(targets[blockIdx.x]);
  const int first = static_cast<int>(threadIdx.x) * N, step = static_cast<int>(blockDim.x) * N;
  SoftmaxSums sums = SoftmaxSums::none();
#pragma unroll 4
  for (int column = first; column < width; column += step) {
    float x[N];
    load(row + column, x);
    sums.add(x);
  }
  sums = block_merge(sums, slots, [](SoftmaxSums& a, const SoftmaxSums& b) { a.merge(b); });
  if (threadIdx.x == 0) {
    whole = sums;
    row_losses[blockIdx.x] =
        cross_entropy_loss(sums.sum, sums.top, static_cast<float>(row[target]));
  }
  __syncthreads();
  const int last = last_column(first, width, step);
  const float top = whole.top, scale = 1.0f / whole.sum;
#pragma unroll 2
  for (int column = last; column >= 0; column -= step) {
    float x[N];
    load(row + column, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = exp_f32(x[i] - top) * scale - (column + i == target ? 1.0f : 0.0f);
    }
    store(row + column, x);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads)
    kl_kernel(T* __restrict__ logits, const T* __restrict__ reference,
              double* __restrict__ row_losses, int width) {
  __shared__ KlSums slots[kMaxWarps], whole;
  T* row = logits + static_cast<int64_t>(blockIdx.x) * width;
  const T* reference_row = reference + static_cast<int64_t>(blockIdx.x) * width;
  const int first = static_cast<int>(threadIdx.x) * N, step = static_cast<int>(blockDim.x) * N;
  KlSums sums = KlSums::none();
#pragma unroll 2
  for (int column = first; column < width; column += step) {
    float x[N], r[N];
    load(row + column, x);
    load(reference_row + column, r);
    sums.add(x, r);
  }
  sums = block_merge(sums, slots, [](KlSums& a, const KlSums& b) { a.merge(b); });
  if (threadIdx.x == 0) {
    whole = sums;
    row_losses[blockIdx.x] = kl_loss(sums.model.sum, sums.reference.sum, sums.weighted);
  }
  __syncthreads();
  const int last = last_column(first, width, step);
  const float top = whole.model.top, reference_top = whole.reference.top;
  const float ratio = whole.reference.sum / whole.model.sum, scale = 1.0f / whole.reference.sum;
#pragma unroll 2
  for (int column = last; column >= 0; column -= step) {
    float x[N], r[N];
    load(row + column, x);
    load(reference_row + column, r);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = kl_gradient(exp_f32(x[i] - top), exp_f32(r[i] - reference_top), ratio, scale);
    }
    store(row + column, x);
  }
}

template <int N>
int64_t threads(int64_t width) {
  return std::min<int64_t>(kMaxThreads, ceil_div(ceil_div(width, N), kWarp) * kWarp);
}

}  // namespace

void cross_entropy_rows(Element element, void* logits, const int64_t* targets, double* row_losses,
                        double* loss, int64_t rows, int64_t width, Stream stream) {
  by_element(element, [&]<typename T>() {
    const auto run = [&]<int N>() {
      launch("cross_entropy_rows", cross_entropy_kernel<T, N>, rows, threads<N>(width), stream,
             static_cast<T*>(logits), targets, row_losses, static_cast<int>(width));
    };
    if (packs<T, kPack<T>>({logits}, {width})) {
      run.template operator()<kPack<T>>();
    } else {
      run.template operator()<1>();
    }
  });
  add_in_order(row_losses, rows, loss, stream);
}

void kl_rows(Element element, void* logits, const void* reference, double* row_losses, double* loss,
             int64_t rows, int64_t width, Stream stream) {
  by_element(element, [&]<typename T>() {
    const auto run = [&]<int N>() {
      launch("kl_rows", kl_kernel<T, N>, rows, threads<N>(width), stream, static_cast<T*>(logits),
             static_cast<const T*>(reference), row_losses, static_cast<int>(width));
    };
    if (packs<T, kPack<T>>({logits, reference}, {width})) {
      run.template operator()<kPack<T>>();
    } else {
      run.template operator()<1>();
    }
  });
  add_in_order(row_losses, rows, loss, stream);
}

}  // namespace safegrad::cuda
