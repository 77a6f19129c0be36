// fake_communicator.h: one rank of a job of any size, alone: allocates and counts as the real one
// would.
#pragma once
#include <cstdint>
#include <memory>

#include "dist/communicator.h"
#include "dist/mesh.h"

namespace safegrad::dist {

/// Rank `rank` of `size` whose peers are not there, for CPU tensors. Buffers, receive windows and
/// counters are those of MPI between machines; nothing is sent. A gather has this rank's shard in
/// its place and zeros for the others, a sum this rank's part alone, an exchange of scalars or
/// words zeros for the others: the same bits every run, finite where this rank's are. Every call
/// returns at once. A broadcast from another rank and a split throw UsageError: nobody knows what
/// the others would say.
class FakeCommunicator : public Communicator {
 public:
  FakeCommunicator(int rank, int size) : rank_(rank), size_(size) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) override;
  std::string broadcast(const std::string& text, int root) override;
  void barrier() override {}

  ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) override;
  void finish_shard_writes() override {}
  at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) override;
  at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) override;
  std::unique_ptr<Work> all_gather(at::Tensor full, at::Tensor shard) override;
  std::unique_ptr<Work> reduce_scatter(at::Tensor shard, at::Tensor full) override;
  void all_reduce(at::Tensor t) override;
  std::vector<double> all_gather_scalars(const at::Tensor& values) override;
  std::unique_ptr<Communicator> split(int colour) override;

 private:
  int rank_, size_;
};

/// The mesh of rank `rank` of `ranks`, as Mesh would split it; `shards` 0 means all ranks. Throws
/// InputError if it does not divide them.
Mesh make_fake_mesh(int rank, int ranks, int64_t shards);

}  // namespace safegrad::dist
