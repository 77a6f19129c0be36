#include "dist/mesh.h"

#include <utility>

#include "core/config_place.h"
#include "core/words.h"

namespace safegrad::dist {

void Mesh::check(int64_t ranks, int64_t shards) {
  if (shards == 0) return;
  if (shards <= ranks && ranks % shards == 0) return;
  throw NamedFileError("parallel.shards",
                       fmt::format("got {}, which does not divide the {}; allowed: all, or a "
                                   "divisor of {}",
                                   shards, counted(ranks, "rank"), ranks));
}

Mesh::Mesh(std::unique_ptr<Communicator> world, int64_t shards) : world_(std::move(world)) {
  check(world_->size(), shards);
  if (shards == 0) shards = world_->size();
  world_->about("shard group");
  shard_group_ = world_->split(static_cast<int>(world_->rank() / shards));
  world_->about("replica group");
  replica_group_ = world_->split(static_cast<int>(world_->rank() % shards));
  world_->about("");
}

Mesh::Mesh(std::unique_ptr<Communicator> world, std::unique_ptr<Communicator> shard_group,
           std::unique_ptr<Communicator> replica_group)
    : world_(std::move(world)),
      shard_group_(std::move(shard_group)),
      replica_group_(std::move(replica_group)) {}

}  // namespace safegrad::dist
