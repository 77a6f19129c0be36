// norm.cu: RMSNorm, a row in the registers of its threads, and its backward in one sweep.
#include <algorithm>

#include "core/gpu_limits.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace safegrad::cuda {
namespace {

// A row lives in the registers of its threads: this many accesses of each.
template <int N>
constexpr int kHeld = N == 1 ? 16 : 4;
// Enough for the widest row.
template <int N>
constexpr int kMaxThreads = N == 8 ? 256 : 512;
constexpr int kSmallThreads = 128;  // of a block that takes several short rows
// Blocks of a backward, each with a contiguous run of rows and one partial weight gradient: enough
// for the largest card, few enough that the partials are small beside the rows.
constexpr int64_t kBackwardBlocks = 512;

// `lanes` threads work on a row: a power of two in one warp and several rows a block, or a whole
// block.
struct Plan {
  int lanes, threads;
  int rows() const { return threads / lanes; }
};

template <int N>
Plan plan(int64_t width) {
  const int64_t accesses = ceil_div(width, N);
  if (accesses <= kWarp * kHeld<N>) {
    int lanes = 1;
    while (lanes < accesses && lanes < kWarp) lanes *= 2;
    return {lanes, kSmallThreads};
  }
  const int threads = kWarp * static_cast<int>(ceil_div(accesses, kWarp * kHeld<N>));
  check_limit("rms_norm", "elements a row", width, kWidestGpuNorm);
  return {threads, threads};
}

// Sum over the threads of a row, the same bits in each: a + b = b + a within a warp, then warps in
// order. Consecutive calls alternate between two sets of slots: then one barrier a call is enough.
__device__ float row_sum(float value, int lanes, float* slots) {
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  if (lanes <= kWarp) return value;
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < lanes / kWarp; ++warp) sum += slots[warp];
  return sum;
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads<N>, 1)
    rms_norm_kernel(const T* __restrict__ x, int64_t x_stride, const T* __restrict__ weight,
                    float eps, T* __restrict__ y, float* __restrict__ rstd, int64_t rows, int width,
                    int lanes) {
  __shared__ float slots[kMaxWarps];
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int end = row < rows ? width : 0;
  Pack<T, N> held[kHeld<N>];
  float square = 0.0f;
#pragma unroll
  for (int p = 0; p < kHeld<N>; ++p) {
    const int column = (p * lanes + lane) * N;
    if (column >= end) continue;
    held[p] = load<N>(x + row * x_stride + column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto v = static_cast<float>(held[p].element[i]);
      square += v * v;
    }
  }
  const float scale = rms_scale(row_sum(square, lanes, slots), static_cast<float>(width), eps);
  if (lane == 0 && row < rows) rstd[row] = scale;
#pragma unroll
  for (int p = 0; p < kHeld<N>; ++p) {
    const int column = (p * lanes + lane) * N;
    if (column >= end) continue;
    float w[N], out[N];
    load(weight + column, w);
#pragma unroll
    for (int i = 0; i < N; ++i)
      out[i] = normed(static_cast<float>(held[p].element[i]), scale, w[i]);
    store(y + row * width + column, out);
  }
}

// The threads of a warp that hold the same columns of different rows add up; the first of them
// holds the sum.
template <int N>
__device__ void add_rows_of_warp(float (&sums)[kHeld<N>][N], int lanes) {
  for (int offset = lanes; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int p = 0; p < kHeld<N>; ++p) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[p][i] += __shfl_xor_sync(kAllLanes, sums[p][i], offset);
    }
  }
}

// One partial a block, or, where a warp holds whole rows, one a warp.
template <int N>
__device__ void write_partial(float (&sums)[kHeld<N>][N], float* partials, int width, int lanes) {
  int64_t partial = blockIdx.x;
  if (lanes <= kWarp) {
    add_rows_of_warp<N>(sums, lanes);
    if (static_cast<int>(threadIdx.x % kWarp) >= lanes) return;
    partial = partial * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  }
  const int lane = static_cast<int>(threadIdx.x) % lanes;
#pragma unroll
  for (int p = 0; p < kHeld<N>; ++p) {
    const int column = (p * lanes + lane) * N;
    if (column >= width) continue;
    float* to = partials + partial * width + column;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = sums[p][i];
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads<N>, 512 / kMaxThreads<N>)
    rms_norm_backward_kernel(const T* __restrict__ dy, int64_t dy_stride, const T* __restrict__ x,
                             int64_t x_stride, const float* __restrict__ rstd,
                             const T* __restrict__ weight, T* __restrict__ dx, int64_t dx_stride,
                             float* __restrict__ partials, int64_t rows, int64_t rows_a_block,
                             int width, int lanes) {
  __shared__ float slots[2][kMaxWarps];
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int row_in_block = static_cast<int>(threadIdx.x) / lanes;
  const int rows_at_once = static_cast<int>(blockDim.x) / lanes;
  const int64_t begin = blockIdx.x * rows_a_block, rest = rows - begin;
  const auto count = static_cast<int>(rest < rows_a_block ? rest : rows_a_block);
  dy += begin * dy_stride + lane * N;
  x += begin * x_stride + lane * N;
  dx += begin * dx_stride + lane * N;
  weight += lane * N;
  rstd += begin;
  float sums[kHeld<N>][N] = {};
  int turn = 0;
  for (int first = 0; first < count; first += rows_at_once, turn ^= 1) {
    const int row = first + row_in_block;
    const int columns = (row < count ? width : 0) - lane * N;  // from this thread's first one
    const T *x_row = x + row * x_stride, *dy_row = dy + row * dy_stride;
    T* dx_row = dx + row * dx_stride;
    Pack<T, N> in[kHeld<N>], gradient[kHeld<N>];
    float along = 0.0f;
#pragma unroll
    for (int p = 0; p < kHeld<N>; ++p) {
      const int column = p * lanes * N;
      if (column >= columns) continue;
      in[p] = load<N>(x_row + column);
      gradient[p] = load<N>(dy_row + column);
      float w[N];
      load(weight + column, w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        along += static_cast<float>(gradient[p].element[i]) * w[i] *
                 static_cast<float>(in[p].element[i]);
      }
    }
    along = row_sum(along, lanes, slots[turn]);
    const float scale = row < count ? rstd[row] : 0.0f;
    const float pull = norm_pull(along, scale, 1.0f / static_cast<float>(width));
#pragma unroll
    for (int p = 0; p < kHeld<N>; ++p) {
      const int column = p * lanes * N;
      if (column >= columns) continue;
      float w[N], out[N];
      load(weight + column, w);
      load(dx_row + column, out);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const auto g = static_cast<float>(gradient[p].element[i]);
        const auto v = static_cast<float>(in[p].element[i]);
        out[i] += norm_input_gradient(g, w[i], v, scale, pull);
        sums[p][i] += norm_weight_gradient(g, v, scale);
      }
      store(dx_row + column, out);
    }
  }
  if (partials != nullptr) write_partial<N>(sums, partials, width, lanes);
}

constexpr int kSumWarps = 16;

// A warp owns 32 columns of every 16th partial; warps add up in order.
template <typename G>
__global__ void __launch_bounds__(kSumWarps* kWarp)
    add_norm_partials_kernel(const float* __restrict__ partials, int64_t count, int width,
                             G* __restrict__ gradient, bool fresh) {
  __shared__ float slots[kSumWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = static_cast<int>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (column < width) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += kSumWarps) sum += partials[i * width + column];
  }
  slots[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= width) return;
  float total = fresh ? 0.0f : static_cast<float>(gradient[column]);
  float added = 0.0f;
  for (int w = 0; w < kSumWarps; ++w) added += slots[w][lane];
  gradient[column] = static_cast<G>(total + added);
}

template <typename T, int N>
void norm(ConstRows x, const void* weight, float eps, void* y, float* rstd, int64_t rows,
          int64_t width, Stream stream) {
  const Plan p = plan<N>(width);
  launch("rms_norm", rms_norm_kernel<T, N>, ceil_div(rows, p.rows()), p.threads, stream,
         static_cast<const T*>(x.data), x.stride, static_cast<const T*>(weight), eps,
         static_cast<T*>(y), rstd, rows, static_cast<int>(width), p.lanes);
}

template <typename T, int N>
void norm_backward(ConstRows dy, ConstRows x, const float* rstd, const void* weight, Rows dx,
                   const NormWeightGradient& dw, int64_t rows, int64_t width, Stream stream) {
  const Plan p = plan<N>(width);
  const int64_t rows_a_block = ceil_div(ceil_div(rows, kBackwardBlocks), p.rows()) * p.rows();
  const int64_t blocks = ceil_div(rows, rows_a_block);
  const bool wanted = dw.gradient != nullptr;
  launch("rms_norm_backward", rms_norm_backward_kernel<T, N>, blocks, p.threads, stream,
         static_cast<const T*>(dy.data), dy.stride, static_cast<const T*>(x.data), x.stride, rstd,
         static_cast<const T*>(weight), static_cast<T*>(dx.data), dx.stride,
         wanted ? dw.partials : nullptr, rows, rows_a_block, static_cast<int>(width), p.lanes);
  if (!wanted) return;
  const int64_t partials = p.lanes <= kWarp ? blocks * (p.threads / kWarp) : blocks;
  by_element(dw.element, [&]<typename G>() {
    launch("add_norm_partials", add_norm_partials_kernel<G>, ceil_div(width, kWarp),
           kSumWarps * kWarp, stream, dw.partials, partials, static_cast<int>(width),
           static_cast<G*>(dw.gradient), dw.fresh);
  });
}

}  // namespace

int64_t norm_partials(int64_t width) {
  // Short rows, up to 1024 wide, leave one partial a warp.
  return width <= 1024 ? kBackwardBlocks * (kSmallThreads / kWarp) : kBackwardBlocks;
}

void rms_norm(Element element, ConstRows x, const void* weight, float eps, void* y, float* rstd,
              int64_t rows, int64_t width, Stream stream) {
  by_element(element, [&]<typename T>() {
    if (packs<T, kPack<T>>({x.data, weight, y}, {x.stride, width})) {
      norm<T, kPack<T>>(x, weight, eps, y, rstd, rows, width, stream);
    } else {
      norm<T, 1>(x, weight, eps, y, rstd, rows, width, stream);
    }
  });
}

void rms_norm_backward(Element element, ConstRows dy, ConstRows x, const float* rstd,
                       const void* weight, Rows dx, const NormWeightGradient& weight_gradient,
                       int64_t rows, int64_t width, Stream stream) {
  if (rows == 0) return;
  by_element(element, [&]<typename T>() {
    if (packs<T, kPack<T>>({dy.data, x.data, weight, dx.data},
                           {dy.stride, x.stride, dx.stride, width})) {
      norm_backward<T, kPack<T>>(dy, x, rstd, weight, dx, weight_gradient, rows, width, stream);
    } else {
      norm_backward<T, 1>(dy, x, rstd, weight, dx, weight_gradient, rows, width, stream);
    }
  });
}

}  // namespace safegrad::cuda
