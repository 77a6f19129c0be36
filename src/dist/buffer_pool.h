// buffer_pool.h: flat buffers for gathers and gradients, allocated once and lent again and again.
#pragma once
#include <map>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace safegrad::dist {

/// Lends flat tensors by (size, dtype). After the first step nothing is allocated any more, so peak
/// memory is flat.
class BufferPool {
 public:
  /// A flat tensor of `numel` elements with arbitrary contents.
  at::Tensor take(int64_t numel, at::ScalarType dtype);
  void give_back(at::Tensor buffer);
  /// Bytes of every buffer ever made.
  int64_t bytes() const { return bytes_; }

 private:
  std::map<std::pair<int64_t, at::ScalarType>, std::vector<at::Tensor>> free_;
  int64_t bytes_ = 0;
};

}  // namespace safegrad::dist
