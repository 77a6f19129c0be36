// step_time.h: how long a step should take, from its work, its traffic and the figures of devices
// and networks.
#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "core/config.h"
#include "core/hardware.h"
#include "dist/communicator.h"
#include "dist/estimate_walk.h"

namespace safegrad::dist {

/// What the busiest rank does in a step.
struct StepWork {
  double flops = 0;        ///< matrix products that are executed
  double swept_bytes = 0;  ///< that norms, losses, inner products and updates read and write
  int64_t micro_batches = 1;
  std::map<std::string, Traffic> traffic;  ///< of a rank
  double first_gather_bytes = 0;           ///< nothing runs meanwhile
  double last_reduce_bytes = 0;
};

struct StepTime {
  double products_s = 0, memory_s = 0, network_s = 0;  ///< each by itself
  double total_s = 0;                                  ///< with what overlaps
  std::map<std::string, double> by_collective;         ///< of network_s
  std::string bottleneck;                              ///< the largest of the three, in words
};

/// Rate of large products in FLOP/s of one rank.
double gemm_rate(const DeviceFigures& device, const RunConfig& config);

/// products = flops / rate; memory = swept bytes / bandwidth; network: every collective its bytes
/// over the slower of the links that it crosses, and a latency for every peer. Where the device
/// overlaps, gathers and reductions hide behind the work of each micro-batch but for the first
/// gather and the last reduction; all-reduces and scalars never do.
StepTime step_time(const StepWork& work, const Layout& layout, const DeviceFigures& device,
                   const Hardware& hardware, double rate);

}  // namespace safegrad::dist
