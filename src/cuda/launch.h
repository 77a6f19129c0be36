// launch.h: how every kernel is launched.
#pragma once
#include <cstdint>
#include <utility>

#include <c10/util/BFloat16.h>
#include <cuda_runtime.h>

#include "cuda/kernels.h"
#include "cuda/launch_check.h"

namespace safegrad::cuda {

/// Enqueues kernel<<<blocks, threads>>>(arguments...); nothing if there are no blocks.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int64_t threads,
            Stream stream, Arguments&&... arguments) {
  if (blocks == 0) return;
  check_limit(name, "blocks", blocks, 0x7FFFFFFF);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check_launch(name, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

/// Calls body<T>() for the element type.
template <typename Body>
void by_element(Element element, const Body& body) {
  if (element == Element::f32) {
    body.template operator()<float>();
  } else {
    body.template operator()<c10::BFloat16>();
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// sum[0] += Σ_i partials[i] in a fixed order, by one block.
void add_in_order(const double* partials, int64_t n, double* sum, Stream stream);

}  // namespace safegrad::cuda
