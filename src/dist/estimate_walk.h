// estimate_walk.h: the engine's schedule of gathers, gradient buffers and reductions, with sizes in
// place of tensors.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "dist/communicator.h"
#include "dist/engine.h"

namespace safegrad::dist {

/// What gathers and reductions go through, and so what memory they take.
enum class Transport {
  shared_memory,  ///< ranks of one machine over MPI: gathers move nothing
  messages,       ///< MPI between machines: pieces are received in windows
  nccl,           ///< GPUs: NCCL's own buffers are the card's reserve
};

/// World = replicas × shards, as in Mesh.
struct Layout {
  int64_t ranks = 1, shards = 1;
  Transport transport = Transport::messages;
  int64_t replicas() const { return ranks / shards; }
};

/// Flat sizes of a unit's trainable or frozen part, padded as FlatGroup pads them.
struct PartSize {
  int64_t full = 0, shard = 0;  ///< elements; 0: the unit has no such part
  bool sharded = false;
};
struct UnitSize {
  PartSize trainable, frozen;
  bool resident = false;
};
UnitSize size_of(const Unit& unit, const Layout& layout, bool replicate_frozen);

/// Flat buffers by size as BufferPool lends them; bytes() never shrinks.
class PoolSize {
 public:
  void take(int64_t numel, int64_t element);
  void give_back(int64_t numel, int64_t element);
  int64_t bytes() const { return bytes_; }

 private:
  std::map<std::pair<int64_t, int64_t>, int64_t> free_;
  int64_t bytes_ = 0;
};

/// One rank's steps. Buffers in bytes, traffic as communicators count it.
class Walk {
 public:
  /// `units`: the model's and, last, the reference head's where one is kept (`reference_head`).
  Walk(const CausalLM& model, const EngineOptions& options, const Layout& layout,
       std::vector<UnitSize> units, bool reference_head);

  /// A step of `micro_batches`, each in `passes` (objectives of each pass).
  void step(int64_t micro_batches, const std::vector<std::vector<size_t>>& passes);

  int64_t gather_buffers() const { return gathers_.bytes(); }
  int64_t buffers() const { return gathers_.bytes() + reduce_inputs_.bytes() + own_.bytes(); }
  /// Most bytes of receive windows while a block's backward runs, right after it, when its own
  /// reductions have been started too, at the last reductions of a backward, and after the last
  /// backward of a step.
  const std::vector<int64_t>& windows_at_block() const { return at_block_; }
  const std::vector<int64_t>& windows_behind_block() const { return behind_block_; }
  int64_t windows_at_end() const { return at_end_; }
  int64_t windows_after() const { return after_; }
  /// Of all steps together: all_gather, reduce_scatter, all_reduce.
  const std::map<std::string, Traffic>& traffic() const { return traffic_; }

 private:
  struct State {
    bool gathered = false, gathering = false, first = true;
    std::vector<size_t> lent, reducing;  // objectives
  };
  void pass(const std::vector<size_t>& active, bool first);
  bool scores(const std::vector<size_t>& active) const;
  std::vector<size_t> group_of(const std::vector<size_t>& units, bool directions) const;
  void start_gather(size_t unit);
  void finish_gather(size_t unit);
  void release(size_t unit);
  void lend(size_t unit, const std::vector<size_t>& active, bool first);
  void start_reduce(size_t unit);
  void finish_reduce(size_t unit);
  void reduce_replicas(int64_t objectives);
  void count(const char* name, int64_t bytes);
  bool lends_accumulators(size_t unit) const;
  bool reduces_directly(size_t unit) const;
  PoolSize& gradient_buffers();
  int64_t window(int64_t ranks, int64_t shard, int64_t element) const;
  std::vector<size_t> gather_order(const std::vector<size_t>& head, bool scores) const;
  std::vector<size_t> head_group(bool scores) const;

  const CausalLM& model_;
  EngineOptions options_;
  Layout layout_;
  std::vector<UnitSize> units_;  // the directions' last
  size_t without_directions_;
  std::map<size_t, size_t> directions_;  // of the units that have one
  bool reference_head_;
  int64_t compute_, reduce_;  // bytes of an element
  std::vector<State> states_;
  PoolSize gathers_, reduce_inputs_, own_;
  int64_t windows_ = 0, at_end_ = 0, after_ = 0;
  std::vector<int64_t> at_block_, behind_block_;
  std::map<std::string, Traffic> traffic_;
};

}  // namespace safegrad::dist
