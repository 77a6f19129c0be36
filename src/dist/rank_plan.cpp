#include "dist/rank_plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "dist/gate.h"
#include "dist/held_gradient.h"
#include "dist/run_shape.h"

namespace safegrad::dist {
namespace {

constexpr int64_t kRanksSeen = 65536, kFewestSteps = 16;

// No micro-batch is looked for beyond so many tokens.
constexpr int64_t kMostTokens = int64_t{1} << 22;

// The batches of one rank's micro-batch, one a pass.
std::vector<PackedBatch> batches_of(const std::vector<Draw>& draws, const PlanInput& input,
                                    const std::vector<std::vector<size_t>>& passes) {
  std::vector<PackedBatch> batches;
  for (const auto& active : passes) batches.push_back(outline(draws, input.streams, active));
  return batches;
}

// Passes as gradients are lent and reduced in them.
std::vector<std::vector<size_t>> passes_to_reduce(const PlanInput& input) {
  // The buffers and messages of either objective are alike.
  if (takes_turns(input.config)) return make_passes(input.config, 1);
  return make_passes(input.config, input.streams.size());
}

// T tokens in sequences of the data's mean length, objectives in proportion to their tokens of a
// step; the last sequence of each is cut. Of these tokens the `active` objectives' alone. Where
// objectives take turns, the active one has all.
PackedBatch filled_batch(const PlanInput& input, int64_t tokens,
                         const std::vector<size_t>& active) {
  std::vector<double> per_step, mean, scored_share;
  double all = 0;
  for (const Stream& s : input.streams) {
    double length = 0, scored = 0;
    for (int64_t n : s.lengths) length += static_cast<double>(n);
    for (int64_t n : s.scored) scored += static_cast<double>(n);
    mean.push_back(length / static_cast<double>(s.lengths.size()));
    scored_share.push_back(scored / length);
    const auto k = per_step.size();
    const bool absent =
        takes_turns(input.config) && std::find(active.begin(), active.end(), k) == active.end();
    per_step.push_back(absent ? 0.0 : mean.back() * static_cast<double>(s.per_step));
    all += per_step.back();
  }
  PackedBatch batch;
  batch.cu_seqlens = batch.segments = batch.scored_segments = {0};
  double before = 0, scored = 0;
  int64_t shared_out = 0;
  for (size_t k = 0; k < input.streams.size(); ++k) {
    before += per_step[k];
    const int64_t until = k + 1 == input.streams.size()
                              ? tokens
                              : std::llround(static_cast<double>(tokens) * before / all);
    const int64_t share = until - std::exchange(shared_out, until);
    const bool runs = std::find(active.begin(), active.end(), k) != active.end();
    const int64_t begin = batch.segments.back(), end = begin + (runs ? share : 0);
    const int64_t length = std::max<int64_t>(1, std::llround(mean[k]));
    for (int64_t at = begin; at < end;) {
      const int64_t next = std::min(end, at + length);
      batch.longest = std::max(batch.longest, next - at);
      batch.cu_seqlens.push_back(at = next);
    }
    batch.segments.push_back(end);
    scored += static_cast<double>(end - begin) * scored_share[k];
    batch.scored_segments.push_back(std::llround(scored));
  }
  batch.positions_end = batch.longest;
  return batch;
}

// What norms, rotations, activations and row losses read and write for a batch, about as often as
// docs/plan.md counts. Each scored row has logits once, for its own objective; a CPU's are float32.
double swept_by_batch(const CausalLM& model, const PackedBatch& batch,
                      const KernelMemory& kernels) {
  const BlockMemory block = model.block_memory(batch, kernels);
  const auto kept = static_cast<double>(block.kept) * static_cast<double>(model.blocks());
  const auto scored = static_cast<double>(batch.scored_segments.back());
  const double element = kernels.gpu ? static_cast<double>(kernels.element) : 4.0;
  return 6.0 * kept + 4.0 * scored * static_cast<double>(model.vocab_size()) * element;
}

class Planning {
 public:
  Planning(CausalLM& model, const PlanInput& input, int64_t ranks)
      : model_(model),
        input_(input),
        layout_(layout_of(input, ranks)),
        options_(engine_options(input.config, model, input.likelihood_probes)),
        passes_(takes_turns(input.config) ? std::vector<std::vector<size_t>>{{0, 1}}
                                          : make_passes(input.config, input.streams.size())),
        estimator_(model, options_, layout_, input.kernels,
                   input.config.model.lora && input.config.model.lora->dropout > 0,
                   passes_to_reduce(input)) {
    plan_.ranks = ranks;
    plan_.shards = layout_.shards;
    plan_.transport = layout_.transport;
    for (const Unit& unit : model.units()) {
      for (const Parameter* p : unit.parameters) {
        plan_.parameters += p->numel();
        if (p->trainable) plan_.trained += p->numel();
      }
    }
    plan_.device_bytes = static_cast<int64_t>(
        std::max(0.0, input.device.memory_gib - input.device.reserve_gib) * (1 << 30));
    if (input.config.checkpoint.every_steps > 0)
      (input.kernels.gpu ? plan_.host_checkpoint_bytes : copy_) =
          estimator_.checkpoint_bytes(input.config.objective.align_every > 1 ||
                                      input.config.objective.gate > 0 || takes_turns(input.config));
  }

  RankPlan run() {
    const Planner planner = look_at_steps();
    describe(plan_of(planner, plan_.step));
    look_at_passes();
    find_largest();
    return plan_;
  }
  MemoryEstimate memory() {
    look_at_steps();
    look_at_passes();
    plan_.memory.join(plan_.reference_pass);
    plan_.memory.join(plan_.probe_pass);
    return plan_.memory;
  }

 private:
  Planner look_at_steps() {
    Planner planner =
        make_planner(input_.config, input_.streams, input_.task_sequences, model_, layout_.ranks);
    // Steps of made-up lengths are all alike, but that objectives may take turns.
    const int64_t both = takes_turns(input_.config) ? turns_of(input_.config, 0).step_of(0) + 1 : 1;
    plan_.steps_seen = both;
    if (input_.task_sequences > 0) {
      const int64_t total = count_steps(input_.config, input_.task_sequences);
      plan_.steps_seen = std::max(steps_seen(total, layout_.ranks), std::min(both, total));
    }
    for (int64_t step = 0; step < plan_.steps_seen; ++step) look_at(step, plan_of(planner, step));
    return planner;
  }

  // A renewal that is not due draws what the last one drew.
  StepPlan plan_of(const Planner& planner, int64_t step) const {
    const bool renews = renews_alignment(input_.config.objective, step);
    return planner.plan(step, /*all=*/renews && !takes_turns(input_.config));
  }

  void look_at(int64_t step, const StepPlan& plan) {
    for (int64_t r = 0; r < layout_.ranks; ++r) {
      int64_t tokens = 0;
      std::vector<std::vector<PackedBatch>> micro_batches;
      for (const auto& micro_batch : plan.assignment) {
        micro_batches.push_back(batches_of(micro_batch[static_cast<size_t>(r)], input_, passes_));
        for (const PackedBatch& batch : micro_batches.back()) tokens += batch.size();
      }
      if (tokens == 0 && r > 0) continue;  // as little as any other rank without sequences
      MemoryEstimate memory = estimator_.memory(micro_batches);
      if (r < layout_.shards) add_copy(memory);
      if (memory.peak() > plan_.memory.peak()) {
        plan_.step = step;
        plan_.rank = r;
        plan_.memory = memory;
      }
    }
  }

  // Ranks of the first replica write the checkpoints.
  void add_copy(MemoryEstimate& memory) const {
    memory.at_peak.checkpoint = memory.largest.checkpoint = copy_;
  }

  // Of the described step.
  std::vector<std::vector<size_t>> passes_of_step() const {
    return plan_.renews ? passes_ : make_passes(input_.config, 1);
  }

  void describe(const StepPlan& plan) {
    StepWork work;
    plan_.align_every = input_.config.objective.align_every;
    plan_.renews = renews_alignment(input_.config.objective, plan_.step);
    const auto passes = passes_of_step();
    plan_.micro_batches = work.micro_batches = static_cast<int64_t>(plan.assignment.size());
    std::vector<bool> busy(static_cast<size_t>(layout_.ranks), false);
    for (const auto& micro_batch : plan.assignment) {
      double most_flops = 0, most_swept = 0;  // ranks wait for the slowest in every micro-batch
      for (int64_t r = 0; r < layout_.ranks; ++r) {
        const auto& draws = micro_batch[static_cast<size_t>(r)];
        if (draws.empty()) continue;
        busy[static_cast<size_t>(r)] = true;
        double flops = 0, swept = 0;
        for (const PackedBatch& batch : batches_of(draws, input_, passes)) {
          plan_.flops += estimator_.flops(batch);
          flops += estimator_.executed_flops(batch);
          swept += swept_by_batch(model_, batch, input_.kernels);
          plan_.task_tokens += batch.segments[1];
          plan_.align_tokens += batch.size() - batch.segments[1];
          if (r == plan_.rank && batch.size() > plan_.tokens) {
            plan_.tokens = batch.size();
            plan_.scored = batch.scored_segments.back();
          }
        }
        most_flops = std::max(most_flops, flops);
        most_swept = std::max(most_swept, swept);
      }
      work.flops += most_flops;
      work.swept_bytes += most_swept;
    }
    plan_.idle_ranks = std::count(busy.begin(), busy.end(), false);
    const int64_t scalars = step_scalars(input_.config, options_.losses.size(), model_) +
                            (options_.keep_direction ? score_slots(plan) : 0);
    work.traffic = plan_.traffic = estimator_.traffic(
        plan_.micro_batches, plan_.renews ? passes_to_reduce(input_) : passes, scalars);
    // Inner products read the gradients; the update reads them again and sweeps master, m and v.
    const Memory& rest = estimator_.persistent();
    work.swept_bytes += 2.0 * static_cast<double>(rest.gradients) +
                        2.0 * static_cast<double>(rest.optimizer + rest.weights);
    const auto [gather, reduce] = exposed_bytes();
    work.first_gather_bytes = gather;
    work.last_reduce_bytes = reduce;
    plan_.time = step_time(work, layout_, input_.device, input_.hardware,
                           gemm_rate(input_.device, input_.config));
  }

  // Bytes of the first gather and the last reduction of a micro-batch: the embedding's.
  std::pair<double, double> exposed_bytes() const {
    const bool one = !plan_.renews || takes_turns(input_.config);
    const size_t reduced = one ? 1 : options_.losses.size();
    const Unit& unit = model_.units()[model_.embedding_unit()];
    const UnitSize size = size_of(unit, layout_, options_.sharding.replicate_frozen);
    const auto peers = static_cast<double>(layout_.shards - 1);
    const auto compute = static_cast<double>(c10::elementSize(options_.sharding.compute_dtype));
    const auto reduce = static_cast<double>(c10::elementSize(options_.sharding.reduce_dtype));
    double gathered = static_cast<double>(size.trainable.shard);
    if (size.frozen.sharded) gathered += static_cast<double>(size.frozen.shard);
    return {peers * gathered * compute, peers * static_cast<double>(size.trainable.shard) * reduce *
                                            static_cast<double>(reduced)};
  }

  // The reference's pass goes once over the alignment set of a KL and over each likelihood probe's
  // file, which is read again whenever the probe is due.
  void look_at_passes() {
    if (options_.losses.size() > 1 && options_.losses[1] == Loss::kl)
      look_at_file(input_.streams[1], /*probe=*/false);
    for (const Stream& probe : input_.probes) look_at_file(probe, /*probe=*/true);
  }

  void look_at_file(Stream stream, bool probe) {
    for (int64_t rows : stream.scored) plan_.reference_file_bytes += rows * model_.width() * 4;
    stream.per_step = static_cast<int64_t>(stream.lengths.size());
    stream.turns = {};
    const StepPlan plan =
        Planner({stream}, layout_.ranks, input_.config.batch.max_tokens_per_rank, 0, 0, 0.0)
            .plan(0);
    for (const auto& micro_batch : plan.assignment) {
      for (const auto& draws : micro_batch) {
        if (draws.empty()) continue;
        const PackedBatch batch = outline(draws, {stream}, {0});
        plan_.reference_pass.join(estimator_.reference_pass(batch));
        if (!probe) continue;
        MemoryEstimate pass = estimator_.probe_pass(batch);
        add_copy(pass);
        plan_.probe_pass.join(pass);
      }
    }
  }

  bool fits(int64_t tokens) const {
    const auto passes = passes_fitting_together();
    return std::all_of(passes.begin(), passes.end(), [&](const auto& together) {
      std::vector<PackedBatch> one;
      for (const auto& active : together) one.push_back(filled_batch(input_, tokens, active));
      return estimator_.memory({one, one}).peak() + copy_ <= plan_.device_bytes;
    });
  }

  // The passes of each kind of micro-batch.
  std::vector<std::vector<std::vector<size_t>>> passes_fitting_together() const {
    using Passes = std::vector<std::vector<size_t>>;
    if (!takes_turns(input_.config)) return std::vector<Passes>(1, passes_);
    return {Passes(1, {0}), Passes(1, {1})};
  }

  void find_largest() {
    int64_t longest = 1;
    for (const Stream& s : input_.streams)
      longest = std::max(longest, *std::max_element(s.lengths.begin(), s.lengths.end()));
    if (!fits(longest)) return;
    int64_t low = longest, high = longest;  // low fits
    while (high < kMostTokens && fits(high)) low = std::exchange(high, 2 * high);
    while (high - low > std::max<int64_t>(1, low / 256)) {
      const int64_t middle = low + (high - low) / 2;
      (fits(middle) ? low : high) = middle;
    }
    plan_.largest_micro_batch = low;
  }

  CausalLM& model_;
  const PlanInput& input_;
  Layout layout_;
  EngineOptions options_;
  std::vector<std::vector<size_t>> passes_;  // where objectives take turns, one has no sequences
  Estimator estimator_;
  int64_t copy_ = 0;  // bytes of the checkpoint's, beside a CPU rank's tensors
  RankPlan plan_;
};

}  // namespace

Layout layout_of(const PlanInput& input, int64_t ranks) {
  const int64_t asked = input.config.parallel.shards;
  Mesh::check(ranks, asked);
  Layout layout{ranks, asked == 0 ? ranks : asked, Transport::messages};
  if (input.kernels.gpu) layout.transport = Transport::nccl;
  const bool near = layout.shards > 1 && input.device.ranks_per_node % layout.shards == 0;
  if (!input.kernels.gpu && near && !input.separate_machines)
    layout.transport = Transport::shared_memory;
  return layout;
}

int64_t steps_seen(int64_t total, int64_t ranks) {
  return std::min(total, std::max(kFewestSteps, kRanksSeen / ranks));
}

RankPlan plan_rank(CausalLM& model, const PlanInput& input, int64_t ranks) {
  return Planning(model, input, ranks).run();
}

MemoryEstimate plan_memory(CausalLM& model, const PlanInput& input, int64_t ranks) {
  return Planning(model, input, ranks).memory();
}

}  // namespace safegrad::dist
