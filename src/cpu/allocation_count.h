// allocation_count.h: how many bytes the CPU's tensors hold, counted where LibTorch allocates them.
#pragma once
#include <cstdint>
#include <memory>

namespace safegrad {

/// While an object of this type lives, LibTorch's CPU allocations go through it to the allocator
/// that was there before. Counts tensors made meanwhile, and takes those off that are freed, later
/// too. Memory that LibTorch does not ask its allocator for (a library's own buffers, shared
/// mappings) is not counted. One at a time; make it while no other thread allocates tensors.
class AllocationCount {
 public:
  AllocationCount();
  ~AllocationCount();
  AllocationCount(const AllocationCount&) = delete;
  AllocationCount& operator=(const AllocationCount&) = delete;

  int64_t bytes() const;  ///< held now
  /// Most bytes held at a time since the last call (the beginning, at first).
  int64_t take_peak();

 private:
  class Counter;
  std::unique_ptr<Counter> counter_;
};

}  // namespace safegrad
