#include "dist/local_rank.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <string>

#include <unistd.h>

#include "core/error.h"
#include "core/words.h"

namespace safegrad::dist {
namespace {

std::string host_name() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "";
}

// FNV-1a: the same in every process, which std::hash does not promise.
uint64_t hash(const std::string& text) {
  uint64_t value = 0xcbf29ce484222325;
  for (const char c : text) value = (value ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return value;
}

}  // namespace

LocalRank find_local_rank(ControlPlane& control) {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  const uint64_t own = hash(host_name() + "\n" + boot);
  const auto machines = control.all_gather_words(std::span(&own, 1));
  LocalRank local{0, 0};
  for (size_t r = 0; r < machines.size(); ++r) {
    if (machines[r] != own) continue;
    if (static_cast<int>(r) == control.rank()) local.rank = local.ranks;
    ++local.ranks;
  }
  return local;
}

int choose_gpu(ControlPlane& control, const LocalRank& local, const std::vector<uint64_t>& gpus,
               const char* visible) {
  const std::string setting = visible ? fmt::format("'{}'", visible) : "not set";
  const int index = gpus.size() == 1 ? 0 : local.rank;
  agree(control, [&] {
    SAFEGRAD_CHECK(
        !gpus.empty(), InputError,
        "parallel.device: cuda, but rank {} on host {} sees no GPU (CUDA_VISIBLE_DEVICES "
        "is {}); set it to auto or cpu, or start on a host with a GPU and its driver",
        control.rank(), host_name(), setting);
    SAFEGRAD_CHECK(gpus.size() == 1 || local.ranks <= static_cast<int>(gpus.size()), InputError,
                   "rank {} of host {}: {} ranks were started on this host but only {} can be "
                   "seen; start at most {} ranks a host, or make more GPUs visible "
                   "(CUDA_VISIBLE_DEVICES is {})",
                   control.rank(), host_name(), local.ranks,
                   counted(static_cast<int64_t>(gpus.size()), "GPU"), gpus.size(), setting);
  });
  const uint64_t own = gpus[static_cast<size_t>(index)];
  const auto all = control.all_gather_words(std::span(&own, 1));
  agree(control, [&] {
    const auto first = std::find(all.begin(), all.end(), own) - all.begin();
    SAFEGRAD_CHECK(
        first == control.rank(), InputError,
        "ranks {} and {} would use the same GPU of host {} (CUDA_VISIBLE_DEVICES is {}); "
        "start one rank a GPU, or give each rank a GPU of its own",
        first, control.rank(), host_name(), setting);
  });
  return index;
}

}  // namespace safegrad::dist
