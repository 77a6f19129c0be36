// sharded_unit.h: one unit of parameters, 1/R of it on each rank (ZeRO-3, arXiv:1910.02054), with a
// gradient per objective.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/kernels.h"
#include "core/parameter.h"
#include "core/weight_source.h"
#include "dist/buffer_pool.h"
#include "dist/mesh.h"

namespace safegrad::dist {

struct ShardingOptions {
  at::ScalarType compute_dtype = at::kFloat;
  at::ScalarType reduce_dtype = at::kFloat;
  bool replicate_frozen = false;
  at::Device device = at::kCPU;  ///< the engine sets it to its model's
};

/// Parameters laid end to end in one flat buffer, padded with zeros to a multiple of R (zeros add
/// nothing to inner products). P elements, S = P / R on this rank: elements [rank * S, rank * S +
/// S). Parameters become views of the gathered buffer.
class FlatGroup {
 public:
  FlatGroup(std::vector<Parameter*> parameters, int rank, int ranks);

  /// A parameter's elements [begin, end) that lie in this rank's shard, at `offset` of the shard.
  struct Overlap {
    Parameter* parameter;
    int64_t begin, end, offset;
  };
  const std::vector<Overlap>& overlaps() const { return overlaps_; }
  bool empty() const { return parameters_.empty(); }
  int64_t numel() const { return shard_numel_ * ranks_; }  ///< P, padded
  int64_t shard_numel() const { return shard_numel_; }     ///< S
  int64_t used() const { return used_; }                   ///< P without the padding
  /// Elements [begin, end) of the unpadded buffer that this rank holds; may be empty.
  std::pair<int64_t, int64_t> held() const;
  const std::vector<Parameter*>& parameters() const { return parameters_; }

  /// Points every parameter's value (or gradient k) at its place in `full`; undefined tensors take
  /// the views away.
  void view_values(const at::Tensor& full) const;
  void view_gradients(size_t k, const at::Tensor& full) const;
  void zero_padding(at::Tensor& full) const;

 private:
  std::vector<Parameter*> parameters_;
  std::vector<int64_t> offsets_;
  std::vector<Overlap> overlaps_;
  int64_t used_ = 0, shard_numel_ = 0;
  int rank_, ranks_;
};

/// A unit's life in a step: start_gather → finish_gather → (layers read) → release, and around its
/// backward lend_gradients → (layers write) → start_reduce → finish_reduce. With one shard, gathers
/// and reductions cost nothing.
class ShardedUnit {
 public:
  ShardedUnit(const Unit& unit, size_t objectives, const ShardingOptions& options, Mesh& mesh,
              Buffers& buffers);

  const Unit& unit() const { return unit_; }
  bool trains() const { return !trainable_.group.empty(); }

  /// Reads this rank's ranges of every parameter. Reads only; does not communicate.
  void load(const WeightSource& weights);
  /// Order-independent hash of this rank's part of the weights; summed over a shard group it does
  /// not depend on the sharding.
  uint64_t fingerprint() const;

  /// The trainable elements [begin, end) of this rank, out of `numel` in the whole unit (no padding
  /// counts), with master, m and v of them: views [end - begin] f32 of what the optimizer updates.
  struct State {
    int64_t begin, end, numel;
    std::array<at::Tensor, 3> tensors;
  };
  State state() const;
  /// The trainable parameters in the order of those elements, with their shapes.
  std::string trained() const;
  /// The compute copy follows the master weights, after state() was written to from outside.
  void follow_master();

  /// Frozen weights in place of those that load() reads: this rank's shard [S] of them. A
  /// collective lies between any rank's last read and this, finish_shard_writes between this and
  /// the next read.
  void set_frozen(const at::Tensor& shard);

  /// One all-gather of the trainable and one of the frozen part (if present and sharded). No-op
  /// while gathered.
  void start_gather();
  void finish_gather();
  void release();

  /// Gradient buffers for the objectives in `active`, one per objective. `first`: the step's first
  /// contribution. Objectives whose buffer is already lent keep it.
  void lend_gradients(const std::vector<size_t>& active, bool first);
  /// One reduce-scatter per active objective; the sum lands in (first) or is added to this rank's
  /// accumulators.
  void start_reduce();
  void finish_reduce();
  /// One all-reduce for each of these objectives across replicas, after the step's last
  /// micro-batch.
  void reduce_replicas(const std::vector<size_t>& objectives);

  /// anchor <- master, of this rank's shard. Its tensor is allocated the first time.
  void set_anchor();
  /// Accumulated gradient k <- master − anchor.
  void measure_drift(size_t k);
  /// [S] f32; undefined before set_anchor().
  const at::Tensor& anchor() const { return anchor_; }

  /// grams [blocks, K, K] f64 += inner products of this rank's accumulated gradients; row b is of
  /// the parameters whose block is blocks[b]. One kernel for each block that the shard has part of.
  void add_inner_products(const Kernels& kernels, const std::vector<std::string>& blocks,
                          const at::Tensor& grams) const;
  /// Fused combine + AdamW on this rank's shard, which other ranks may see
  /// (Communicator::allocate_shards). coefficients[b] are those of blocks[b]; neighbours that have
  /// the same are one sweep. Vectors (one-dimensional parameters) take no weight decay.
  void update(const Kernels& kernels, const std::vector<std::string>& blocks,
              const std::vector<std::vector<double>>& coefficients, const AdamW& adamw);
  /// This rank's accumulated gradient of objective k, [S] f32, for tests and checks.
  const at::Tensor& gradient_shard(size_t k) const { return accumulated_[k]; }

 private:
  struct Part {
    FlatGroup group;
    bool sharded;
    ShardMemory memory;  // [S] compute dtype: what a gather sends
    at::Tensor full;     // [P] while gathered
    std::unique_ptr<Work> work;
  };
  struct Reduction {
    size_t objective;
    at::Tensor input, output;
    std::unique_ptr<Work> work;
  };
  /// Elements [begin, end) of the shard, which belong to one block.
  struct Segment {
    std::string block;
    int64_t begin, end;
  };
  void allocate(Part& part);
  void find_segments();
  void find_update_ranges();
  std::vector<UpdateRange> update_ranges(int64_t begin, int64_t end) const;
  void start_gather(Part& part);
  void release(Part& part);
  bool lends_accumulators() const;
  BufferPool& gradient_buffers();

  Unit unit_;
  ShardingOptions options_;
  Mesh& mesh_;
  Buffers& buffers_;
  Part trainable_, frozen_;
  ShardState state_;  // [S]; compute: what a gather sends
  at::Tensor anchor_;
  std::vector<Segment> segments_;
  std::vector<UpdateRange> update_ranges_;
  std::vector<at::Tensor> accumulated_;    // K × [S] f32
  std::vector<at::Tensor> gradient_full_;  // K × [P] while lent
  std::vector<size_t> active_;
  std::vector<Reduction> reductions_;
  bool first_ = true, gathered_ = false, gathering_ = false;
};

}  // namespace safegrad::dist
