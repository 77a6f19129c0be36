// solo_communicator.h: one rank with itself.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "dist/communicator.h"

namespace safegrad::dist {

/// Collectives of a single rank on CPU tensors, where nothing else connects ranks. A gather or a
/// reduction is a copy, or nothing where both sides are the same memory.
class SoloCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) override;
  std::string broadcast(const std::string& text, int) override { return text; }
  void barrier() override {}

  ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) override;
  void finish_shard_writes() override {}
  at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) override;
  at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) override;
  std::unique_ptr<Work> all_gather(at::Tensor full, at::Tensor shard) override;
  std::unique_ptr<Work> reduce_scatter(at::Tensor shard, at::Tensor full) override;
  void all_reduce(at::Tensor) override { count("all_reduce", 0); }
  std::vector<double> all_gather_scalars(const at::Tensor& values) override;
  std::unique_ptr<Communicator> split(int colour) override;
};

}  // namespace safegrad::dist
