// gpu_ranks.cpp: tests run on GPUs, one a rank: a single one, or as many as mpirun or torchrun
// starts.
#include <fmt/format.h>

#include "device.h"
#include "dist/cuda_module.h"
#include "dist/rank_main.h"

namespace safegrad::testing {
namespace {

struct Ranks {
  std::unique_ptr<dist::Launcher> launcher;
  std::unique_ptr<RunDevice> device;
};

Ranks& ranks() {
  static Ranks instance;
  return instance;
}

}  // namespace

std::string start_ranks(int* argc, char*** argv) {
  ranks().launcher = dist::make_launcher(argc, argv);
  const uint64_t gpus = dist::visible_gpus().size();
  for (uint64_t seen : ranks().launcher->control().all_gather_words(std::span(&gpus, 1))) {
    if (seen == 0) return "no GPU is visible";
  }
  std::vector<std::string> warnings;
  ranks().device = std::make_unique<RunDevice>(ParallelSection{.device = Device::cuda},
                                               *ranks().launcher, warnings);
  return "";
}

void stop_ranks() {
  ranks().device.reset();
  ranks().launcher.reset();
}

std::unique_ptr<dist::Communicator> world() {
  return ranks().device->connect();
}

const Backend& backend() {
  return ranks().device->backend();
}

}  // namespace safegrad::testing
