// buffer_pool.h: flat buffers for gathers and gradients, allocated once and lent again and again.
#pragma once
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace safegrad::dist {

/// Lends flat tensors by (size, dtype). After the first step nothing is allocated any more, so peak
/// memory is flat.
class BufferPool {
 public:
  using Allocate = std::function<at::Tensor(int64_t numel, at::ScalarType dtype)>;
  /// Where `allocate` is collective, so is take: all ranks take and give back in the same order.
  explicit BufferPool(Allocate allocate) : allocate_(std::move(allocate)) {}

  /// A flat tensor of `numel` elements with arbitrary contents.
  at::Tensor take(int64_t numel, at::ScalarType dtype);
  void give_back(at::Tensor buffer);

 private:
  Allocate allocate_;
  std::map<std::pair<int64_t, at::ScalarType>, std::vector<at::Tensor>> free_;
};

/// The buffers of an engine: what gathers write, what reductions read on every rank, and the rest.
struct Buffers {
  BufferPool gather_outputs, reduce_inputs, own;
};

}  // namespace safegrad::dist
