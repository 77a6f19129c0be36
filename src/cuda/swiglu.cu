// swiglu.cu: the gated activation, and its backward that computes it again.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace safegrad::cuda {
namespace {

constexpr int kThreads = 256;

// A block takes kThreads accesses of one row: blocks_a_row of them side by side.
struct Place {
  int64_t row;
  int column;
};

template <int N>
__device__ Place place(int blocks_a_row) {
  const auto blocks = static_cast<unsigned>(blocks_a_row);
  const unsigned row = blockIdx.x / blocks;
  const unsigned access = (blockIdx.x - row * blocks) * kThreads + threadIdx.x;
  return {row, static_cast<int>(access) * N};
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const T* __restrict__ gate_up, T* __restrict__ act, int width, int blocks_a_row) {
  const auto [row, column] = place<N>(blocks_a_row);
  if (column >= width) return;
  const T* gate = gate_up + 2 * row * width + column;
  float g[N], u[N];
  load(gate, g);
  load(gate + width, u);
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] = swiglu_value(g[i], u[i]);
  store(act + row * width + column, g);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const T* __restrict__ dact, const T* __restrict__ gate_up,
                           T* __restrict__ dgate_up, T* __restrict__ act, int width,
                           int blocks_a_row) {
  const auto [row, column] = place<N>(blocks_a_row);
  if (column >= width) return;
  const int64_t from = 2 * row * width + column, to = row * width + column;
  float g[N], u[N], d[N], value[N];
  load(gate_up + from, g);
  load(gate_up + from + width, u);
  load(dact + to, d);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const SwigluGradient gradient = swiglu_gradient(g[i], u[i], d[i]);
    value[i] = gradient.act;
    g[i] = gradient.dgate;
    u[i] = gradient.dup;
  }
  store(dgate_up + from, g);
  store(dgate_up + from + width, u);
  store(act + to, value);
}

}  // namespace

void swiglu(Element element, const void* gate_up, void* act, int64_t rows, int64_t width,
            Stream stream) {
  by_element(element, [&]<typename T>() {
    const auto run = [&]<int N>() {
      const int64_t blocks = ceil_div(width, N * kThreads);
      launch("swiglu", swiglu_kernel<T, N>, rows * blocks, kThreads, stream,
             static_cast<const T*>(gate_up), static_cast<T*>(act), static_cast<int>(width),
             static_cast<int>(blocks));
    };
    if (packs<T, kPack<T>>({gate_up, act}, {width})) {
      run.template operator()<kPack<T>>();
    } else {
      run.template operator()<1>();
    }
  });
}

void swiglu_backward(Element element, const void* dact, const void* gate_up, void* dgate_up,
                     void* act, int64_t rows, int64_t width, Stream stream) {
  by_element(element, [&]<typename T>() {
    const auto run = [&]<int N>() {
      const int64_t blocks = ceil_div(width, N * kThreads);
      launch("swiglu_backward", swiglu_backward_kernel<T, N>, rows * blocks, kThreads, stream,
             static_cast<const T*>(dact), static_cast<const T*>(gate_up), static_cast<T*>(dgate_up),
             static_cast<T*>(act), static_cast<int>(width), static_cast<int>(blocks));
    };
    if (packs<T, kPack<T>>({dact, gate_up, dgate_up, act}, {width})) {
      run.template operator()<kPack<T>>();
    } else {
      run.template operator()<1>();
    }
  });
}

}  // namespace safegrad::cuda
