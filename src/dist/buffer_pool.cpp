#include "dist/buffer_pool.h"

namespace safegrad::dist {

at::Tensor BufferPool::take(int64_t numel, at::ScalarType dtype) {
  auto& buffers = free_[{numel, dtype}];
  if (buffers.empty()) return allocate_(numel, dtype);
  at::Tensor buffer = std::move(buffers.back());
  buffers.pop_back();
  return buffer;
}

void BufferPool::give_back(at::Tensor buffer) {
  const std::pair key{buffer.numel(), buffer.scalar_type()};
  free_[key].push_back(std::move(buffer));
}

}  // namespace safegrad::dist
