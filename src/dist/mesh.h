// mesh.h: the grid of ranks, replicas × shards; the only place that divides the world.
#pragma once
#include <cstdint>
#include <memory>

#include "dist/communicator.h"

namespace safegrad::dist {

/// Rank r is shard r % shards of replica r / shards. shards = 1 is data parallel, shards = world is
/// fully sharded, between is hybrid: reduce-scatter inside the shard group, all-reduce of the shard
/// across replicas. All collectives.
class Mesh {
 public:
  /// `shards` 0 means all ranks. Throws NamedFileError of parallel.shards (both numbers) if it does
  /// not divide `ranks`. Does not communicate.
  static void check(int64_t ranks, int64_t shards);
  /// Checks, then splits the world.
  Mesh(std::unique_ptr<Communicator> world, int64_t shards);
  /// Of groups that are split already.
  Mesh(std::unique_ptr<Communicator> world, std::unique_ptr<Communicator> shard_group,
       std::unique_ptr<Communicator> replica_group);

  Communicator& world() { return *world_; }
  Communicator& shard_group() { return *shard_group_; }      ///< ranks that hold one model together
  Communicator& replica_group() { return *replica_group_; }  ///< ranks that hold the same shard
  int shards() const { return shard_group_->size(); }
  int replicas() const { return replica_group_->size(); }

 private:
  std::unique_ptr<Communicator> world_, shard_group_, replica_group_;
};

}  // namespace safegrad::dist
