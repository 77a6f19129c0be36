#include "plan_run.h"

#include <chrono>
#include <utility>

#include <ATen/ATen.h>
#include <sys/resource.h>

#include "cpu/allocation_count.h"
#include "dist/fake_communicator.h"

namespace safegrad {
namespace {

int64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

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
  run.probe
      .clear();  // they wait for hidden states of other ranks; data.probes still says of which kind
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

  const auto before = traffic_of(mesh);
  count.take_peak();
  const auto start = std::chrono::steady_clock::now();
  trainer.step(plan.step);
  RankRun result;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  result.tensor_bytes = count.take_peak();
  result.resident_bytes = peak_resident_bytes();
  for (const auto& [name, after] : traffic_of(mesh)) {
    const auto found = before.find(name);
    const dist::Traffic old = found == before.end() ? dist::Traffic{} : found->second;
    if (after.calls > old.calls)
      result.traffic[name] = {after.calls - old.calls, after.bytes - old.bytes};
  }
  return result;
}

}  // namespace safegrad
