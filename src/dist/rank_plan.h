// rank_plan.h: the plan of a run on N ranks: what the fullest rank holds, what a step sends, how
// long it should take, what would still fit.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/hardware.h"
#include "core/kernel_memory.h"
#include "core/planner.h"
#include "dist/estimate.h"
#include "dist/step_time.h"

namespace safegrad::dist {

/// What a plan is made of besides the number of ranks.
struct PlanInput {
  RunConfig config;
  std::vector<Stream> streams;  ///< as make_streams, or made up
  int64_t task_sequences = 0;   ///< of the data set; 0: lengths are made up
  bool likelihood_probes = false;
  std::vector<Stream> probes;  ///< files of likelihood probes, where their lengths are known
  DeviceFigures device;
  Hardware hardware;
  KernelMemory kernels;
  /// CPU ranks exchange messages even where one machine has them all; else those of one machine
  /// (device.ranks_per_node) share its memory.
  bool separate_machines = false;
};

struct RankPlan {
  int64_t ranks = 0, shards = 0;
  Transport transport = Transport::messages;
  int64_t parameters = 0, trained = 0;  ///< elements of the whole model

  // The step, of the first steps_seen, in which a rank holds most, and that rank.
  int64_t steps_seen = 0;
  int64_t step = 0, rank = 0, micro_batches = 0;
  /// The alignment gradient is computed in one of so many steps; `renews`: in this one.
  int64_t align_every = 1;
  bool renews = true;
  int64_t tokens = 0, scored = 0;             ///< of its largest micro-batch
  int64_t idle_ranks = 0;                     ///< without a sequence in that step
  int64_t task_tokens = 0, align_tokens = 0;  ///< of all ranks in that step
  MemoryEstimate memory;
  MemoryEstimate reference_pass;           ///< before the first step; 0 without a KL
  MemoryEstimate probe_pass;               ///< of the likelihood probes; 0 without
  int64_t host_checkpoint_bytes = 0;       ///< a GPU rank's copy of its state, in host memory
  int64_t reference_file_bytes = 0;        ///< of all ranks, on disk
  std::map<std::string, Traffic> traffic;  ///< that it sends in that step
  double flops = 0;                        ///< necessary, of all ranks in that step
  StepTime time;
  int64_t device_bytes = 0;         ///< that tensors can have on a rank; 0: unknown
  int64_t largest_micro_batch = 0;  ///< tokens that fit; 0: not even the longest sequence does

  /// Of steps, the reference's pass and probes.
  int64_t peak() const {
    return std::max({memory.peak(), reference_pass.peak(), probe_pass.peak()});
  }
  bool fits() const { return peak() <= device_bytes; }
  double tokens_per_s() const {
    return static_cast<double>(task_tokens + align_tokens) / time.total_s;
  }
};

/// Steps of a run of `total` that a plan looks at: those whose ranks are 65,536 together, and at
/// least 16. With made-up lengths all are alike, and it looks at one. Where objectives take turns,
/// it looks at one step of each at least.
int64_t steps_seen(int64_t total, int64_t ranks);

/// Does not communicate and runs nothing. Throws InputError where parallel.shards does not divide
/// the ranks, DataError where a sequence fits in no micro-batch.
RankPlan plan_rank(CausalLM& model, const PlanInput& input, int64_t ranks);

/// The largest memory of a rank alone: in those steps, in the reference's pass or a probe. Throws
/// as plan_rank.
MemoryEstimate plan_memory(CausalLM& model, const PlanInput& input, int64_t ranks);

/// Shards of one copy of the weights, and how ranks reach each other.
Layout layout_of(const PlanInput& input, int64_t ranks);

}  // namespace safegrad::dist
