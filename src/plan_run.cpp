#include "plan_run.h"

#include <chrono>
#include <cmath>
#include <utility>

#include <ATen/ATen.h>

#include "core/error.h"
#include "core/machine_memory.h"
#include "cpu/allocation_count.h"
#include "dist/fake_communicator.h"

namespace safegrad {
namespace {

// Beyond this a plan was wrong.
constexpr double kTolerance = 0.05;

// Gathers and reductions run in the shard group, all-reduces in the replicas', scalars in the
// world.
std::map<std::string, dist::Traffic> traffic_of(dist::Mesh& mesh) {
  std::map<std::string, dist::Traffic> all;
  for (dist::Communicator* group : {&mesh.world(), &mesh.shard_group(), &mesh.replica_group()}) {
    for (const auto& [name, traffic] : group->traffic()) {
      // Of the groups' scalars, those of the fingerprint are none of a step's.
      if (name == "scalars" && group != &mesh.world()) continue;
      all[name].calls += traffic.calls;
      all[name].bytes += traffic.bytes;
    }
  }
  return all;
}

}  // namespace

RankRun run_rank(const RunConfig& config, models::OpenedModel& model, dist::RunData data,
                 const dist::RankPlan& plan) {
  RunConfig run = config;
  // Probes wait for hidden states of other ranks; data.probes still says of which kind they are.
  run.probe.clear();
  const at::ScalarType dtype =
      config.model.dtype == ComputeDtype::bfloat16 ? at::kBFloat16 : at::kFloat;
  data.stand_in = [dtype, width = model.decoder->width()](int64_t rows) {
    return at::zeros({rows, width}, dtype);
  };
  AllocationCount count;
  dist::Mesh mesh =
      dist::make_fake_mesh(static_cast<int>(plan.rank), static_cast<int>(plan.ranks), plan.shards);
  dist::Trainer trainer(run, *model.decoder, *model.weights, data, mesh);
  trainer.step(plan.step);
  // There is a direction, however short this rank's part of the alignment gradient is by itself.
  if (trainer.gate()) trainer.hold({.tokens = 1, .loss = 0, .aa = 1});

  const auto before = traffic_of(mesh);
  count.take_peak();
  const auto start = std::chrono::steady_clock::now();
  trainer.step(plan.step);
  RankRun result;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  result.tensor_bytes = count.take_peak();
  result.resident_bytes = peak_resident_bytes("");
  for (const auto& [name, after] : traffic_of(mesh)) {
    const auto found = before.find(name);
    const dist::Traffic old = found == before.end() ? dist::Traffic{} : found->second;
    if (after.calls > old.calls)
      result.traffic[name] = {after.calls - old.calls, after.bytes - old.bytes};
  }
  return result;
}

int64_t planned_tensor_bytes(const dist::RankPlan& plan) {
  return plan.memory.peak() - plan.memory.at_peak.checkpoint;
}

void check_run(const dist::RankPlan& plan, const RankRun& run) {
  const int64_t bytes = planned_tensor_bytes(plan);
  const double ratio = static_cast<double>(bytes) / static_cast<double>(run.tensor_bytes);
  SAFEGRAD_CHECK(std::abs(ratio - 1) <= kTolerance, RunError,
                 "{} ranks: planned {} bytes a rank, the run held {}: more than {:.0f} % apart",
                 plan.ranks, bytes, run.tensor_bytes, 100 * kTolerance);
  auto all = plan.traffic;
  all.insert(run.traffic.begin(), run.traffic.end());
  auto traffic_in = [](const auto& map, const std::string& name) {
    const auto found = map.find(name);
    return found == map.end() ? dist::Traffic{} : found->second;
  };
  for (const auto& [name, either] : all) {
    const dist::Traffic planned = traffic_in(plan.traffic, name);
    const dist::Traffic sent = traffic_in(run.traffic, name);
    SAFEGRAD_CHECK(planned.calls == sent.calls && planned.bytes == sent.bytes, RunError,
                   "{} ranks: {}: planned {} calls and {} bytes, the run made {} and {}",
                   plan.ranks, name, planned.calls, planned.bytes, sent.calls, sent.bytes);
  }
}

}  // namespace safegrad
