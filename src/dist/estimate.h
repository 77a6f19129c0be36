// estimate.h: what a step costs one rank: memory, traffic, work; counted from sizes, nothing is
// run (docs/plan.md has the formulas).
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/causal_lm.h"
#include "core/config.h"
#include "core/kernel_memory.h"
#include "core/planner.h"
#include "dist/estimate_walk.h"

namespace safegrad::dist {

/// Bytes of one rank.
struct Memory {
  /// Compute copy of the shards, the reference head's included; the direction of scores.
  int64_t weights = 0;
  int64_t optimizer = 0;    ///< m, v, anchor, and master weights where the compute copy is bfloat16
  int64_t gradients = 0;    ///< accumulators, one float32 an objective
  int64_t buffers = 0;      ///< gathered units, gradients on their way, receive windows
  int64_t activations = 0;  ///< kept for the backward, and what a block works with
  int64_t logits = 0;       ///< of a chunk of scored positions
  int64_t reference = 0;    ///< the start model's hidden states of the micro-batch
  int64_t checkpoint = 0;   ///< a CPU rank's copy of its state while it is written, and after
  int64_t total() const;
};

struct MemoryEstimate {
  Memory at_peak;      ///< at the moment when most is held
  Memory largest;      ///< each by itself, at whichever moment
  std::string moment;  ///< of the peak
  int64_t peak() const { return at_peak.total(); }
  /// The larger peak of both, and the largest of each.
  void join(const MemoryEstimate& other);
};

/// Works on sizes alone: the model's parameters need no values, the batches no tensors. Pure: the
/// same numbers on every machine.
class Estimator {
 public:
  Estimator(CausalLM& model, const EngineOptions& options, const Layout& layout,
            const KernelMemory& kernels, bool dropout, std::vector<std::vector<size_t>> passes);

  /// What rests between steps, buffers apart.
  const Memory& persistent() const { return persistent_; }
  /// Peak of a step of these micro-batches, each the batches of its passes.
  MemoryEstimate memory(const std::vector<std::vector<PackedBatch>>& micro_batches) const;
  /// Peak of the forward pass that computes the reference's hidden states.
  MemoryEstimate reference_pass(const PackedBatch& batch) const;
  /// Peak of a likelihood probe's pass, with buffers as steps have left them.
  MemoryEstimate probe_pass(const PackedBatch& batch) const;
  /// Host memory that CheckpointWriter keeps on a rank of the first replica from the first
  /// checkpoint on: master, m and v of its shard, and one tensor more if the steps hold one:
  /// the alignment gradient that is used again or scores samples, or an anchor.
  int64_t checkpoint_bytes(bool one_more) const;
  /// What this rank sends in a step of these passes, by collective; `scalars`: step_scalars().
  std::map<std::string, Traffic> traffic(int64_t micro_batches,
                                         const std::vector<std::vector<size_t>>& passes,
                                         int64_t scalars) const;
  /// Necessary matrix products, the reference head's and the scores' included, as PassSums counts
  /// them.
  double flops(const PackedBatch& batch) const;
  /// Those, and what `recompute: block` runs again.
  double executed_flops(const PackedBatch& batch) const;

 private:
  Walk walk_step(int64_t micro_batches, const std::vector<std::vector<size_t>>& passes) const;
  void add_batch(const PackedBatch& batch, const Walk& walk, MemoryEstimate& estimate) const;
  Memory work_of_head(const PackedBatch& batch) const;

  CausalLM& model_;
  EngineOptions options_;
  Layout layout_;
  KernelMemory kernels_;
  bool dropout_;
  std::vector<std::vector<size_t>> passes_;
  std::vector<UnitSize> units_;
  Memory persistent_;
  std::vector<Walk> walks_;  // of one micro-batch, and of two: a third changes no size
  int64_t reference_buffers_ = 0;
};

/// Bytes of the index tensors of a batch, and of its losses.
int64_t batch_bytes(const PackedBatch& batch, bool dropout);

}  // namespace safegrad::dist
