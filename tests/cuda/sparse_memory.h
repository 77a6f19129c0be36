// sparse_memory.h: tensors of more than 2³¹ elements of which a test touches a few.
#pragma once
#include <cstdint>

#include <ATen/ATen.h>
#include <sys/mman.h>

namespace safegrad::test {

/// Zeros that take memory only where they are touched.
class SparseMemory {
 public:
  explicit SparseMemory(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)),
        data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~SparseMemory() {
    if (mapped()) munmap(data_, bytes_);
  }
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;

  /// False where the system promises no more memory than it has.
  bool mapped() const { return data_ != MAP_FAILED; }
  at::Tensor tensor(at::IntArrayRef shape, at::IntArrayRef strides, at::ScalarType type) const {
    return at::from_blob(data_, shape, strides, type);
  }

 private:
  size_t bytes_;
  void* data_;
};

}  // namespace safegrad::test
