#include "dist/buffer_pool.h"

#include <ATen/ATen.h>

namespace safegrad::dist {

at::Tensor BufferPool::take(int64_t numel, at::ScalarType dtype) {
  auto& buffers = free_[{numel, dtype}];
  if (buffers.empty()) {
    at::Tensor made = at::empty({numel}, dtype);
    bytes_ += made.numel() * made.element_size();
    return made;
  }
  at::Tensor buffer = std::move(buffers.back());
  buffers.pop_back();
  return buffer;
}

void BufferPool::give_back(at::Tensor buffer) {
  const std::pair key{buffer.numel(), buffer.scalar_type()};
  free_[key].push_back(std::move(buffer));
}

}  // namespace safegrad::dist
