#include "dist/step_time.h"

#include <algorithm>

#include <fmt/format.h>

namespace safegrad::dist {
namespace {

// Ranks that exchange, `near` of which share a machine.
struct Group {
  int64_t size, near;
};

Group shard_group(const Layout& layout, int64_t node) {
  return {layout.shards, std::min(layout.shards, node)};
}

// The ranks with the same shard, `shards` apart.
Group replica_group(const Layout& layout, int64_t node) {
  return {layout.replicas(),
          std::min(layout.replicas(), std::max<int64_t>(1, node / layout.shards))};
}

class Links {
 public:
  Links(const Layout& layout, const DeviceFigures& device, const Hardware& hardware)
      : direct_(layout.transport != Transport::nccl),
        inside_(hardware.network(device.inside)),
        between_(hardware.network(device.between)) {}

  // `bytes` that a rank sends in `calls` collectives. NCCL's rings cross a machine's border once
  // for all its ranks; over MPI every rank sends to every other.
  double seconds(const Group& group, double bytes, double calls) const {
    if (group.size <= 1) return 0;
    const auto size = static_cast<double>(group.size), near = static_cast<double>(group.near);
    const double far = size - near;
    const double crossing = far == 0 ? 0 : direct_ ? bytes * far / (size - 1) : bytes / near;
    const double staying = direct_ ? bytes - crossing : near > 1 ? bytes : 0;
    const double nodes = size / near;
    const double hops_between = far == 0 ? 0 : direct_ ? far : nodes;
    const double hops_inside = size - 1 - std::min(size - 1, hops_between);
    return std::max(crossing / rate(between_), staying / rate(inside_)) +
           calls * 1e-6 * (hops_between * between_.latency_us + hops_inside * inside_.latency_us);
  }
  bool crosses(const Group& group) const { return group.size > group.near; }

 private:
  static double rate(const NetworkFigures& n) { return n.gb_per_s * 1e9 * n.share; }

  bool direct_;
  const NetworkFigures& inside_;
  const NetworkFigures& between_;
};

}  // namespace

double gemm_rate(const DeviceFigures& device, const RunConfig& config) {
  const bool half = config.model.dtype == ComputeDtype::bfloat16;
  const double tflops = half                                             ? device.bfloat16_tflops
                        : config.parallel.tf32 && device.tf32_tflops > 0 ? device.tf32_tflops
                                                                         : device.float32_tflops;
  return tflops * 1e12 * device.gemm_share;
}

StepTime step_time(const StepWork& work, const Layout& layout, const DeviceFigures& device,
                   const Hardware& hardware, double rate) {
  const Links links(layout, device, hardware);
  const Group shards = shard_group(layout, device.ranks_per_node);
  const Group replicas = replica_group(layout, device.ranks_per_node);
  const Group world{layout.ranks, std::min(layout.ranks, device.ranks_per_node)};
  const std::map<std::string, Group> groups = {{"all_gather", shards},
                                               {"reduce_scatter", shards},
                                               {"all_reduce", replicas},
                                               {"scalars", world}};
  StepTime time;
  time.products_s = work.flops / rate;
  time.memory_s = work.swept_bytes / (device.memory_gb_per_s * 1e9);
  double hidden = 0;  // what may hide behind the work
  for (const auto& [name, traffic] : work.traffic) {
    const bool in_place = name == "all_gather" && layout.transport == Transport::shared_memory;
    const double seconds = in_place
                               ? 0
                               : links.seconds(groups.at(name), static_cast<double>(traffic.bytes),
                                               static_cast<double>(traffic.calls));
    time.by_collective[name] = seconds;
    time.network_s += seconds;
    if (name == "all_gather" || name == "reduce_scatter") hidden += seconds;
  }
  const auto micro_batches = static_cast<double>(work.micro_batches);
  const double exposed =
      std::min(hidden, micro_batches * (links.seconds(shards, work.first_gather_bytes, 1) +
                                        links.seconds(shards, work.last_reduce_bytes, 1)));
  const double busy = time.products_s + time.memory_s;
  time.total_s = device.overlaps
                     ? std::max(busy, hidden - exposed) + exposed + time.network_s - hidden
                     : busy + time.network_s;
  if (time.network_s > std::max(time.products_s, time.memory_s)) {
    const auto most =
        std::max_element(time.by_collective.begin(), time.by_collective.end(),
                         [](const auto& a, const auto& b) { return a.second < b.second; });
    const bool far = links.crosses(groups.at(most->first));
    time.bottleneck = fmt::format("{} over {}", most->first, far ? device.between : device.inside);
  } else {
    time.bottleneck = time.products_s >= time.memory_s ? "matrix products" : "memory bandwidth";
  }
  return time;
}

}  // namespace safegrad::dist
