#include "device.h"

#include <cmath>
#include <cstdlib>
#include <utility>

#include <fmt/format.h>

#include "core/error.h"
#include "cpu/cpu_backend.h"
#include "dist/cuda_module.h"
#include "dist/local_rank.h"
#include "dist/start_agreement.h"
#include "dist/watched_communicator.h"

namespace safegrad {
namespace {

// What this rank would compute on; the others may see something else.
bool wants_gpu(Device device, std::vector<std::string>& warnings) {
  if (device != Device::automatic) return device == Device::cuda;
  const size_t gpus = dist::visible_gpus().size();
  if (gpus > 0 && !dist::has_cuda_module()) {
    warnings.push_back(fmt::format(
        "{} GPU(s) are visible, but this build has no GPU part: training on the CPU", gpus));
  }
  return gpus > 0 && dist::has_cuda_module();
}

// Where ranks are late, the watchdog knows more than NCCL; it speaks first.
constexpr std::chrono::seconds kReportTime(30);

void check_same_kind(dist::ControlPlane& control, bool gpu) {
  const uint64_t own = gpu;
  const auto all = control.all_gather_words(std::span(&own, 1));
  std::vector<int> with, without;
  for (size_t r = 0; r < all.size(); ++r) (all[r] ? with : without).push_back(static_cast<int>(r));
  dist::agree(control, [&] {
    SAFEGRAD_CHECK(with.empty() || without.empty(), InputError,
                   "parallel.device: auto: ranks {} see a GPU, ranks {} do not; set cpu, or start "
                   "the job where every rank has one",
                   dist::list_ranks(with), dist::list_ranks(without));
  });
}

}  // namespace

std::chrono::milliseconds collective_timeout(const ParallelSection& parallel) {
  return std::chrono::milliseconds(std::llround(1000 * parallel.timeout_seconds));
}

RunDevice::RunDevice(const ParallelSection& parallel, dist::Launcher& launcher,
                     std::vector<std::string>& warnings)
    : parallel_(parallel), launcher_(launcher), backend_(&cpu_backend()) {
  dist::ControlPlane& control = launcher.control();
  const bool gpu = wants_gpu(parallel.device, warnings);
  check_same_kind(control, gpu);
  if (!gpu) {
    dist::agree(control, [&] { launcher.check_cpu(); });
    return;
  }
  const int index = dist::choose_gpu(control, dist::find_local_rank(control), dist::visible_gpus(),
                                     std::getenv("CUDA_VISIBLE_DEVICES"));
  dist::agree(control, [&] {
    // Before any other use of LibTorch that could ask for a GPU: it looks for its CUDA part once.
    gpu_ = dist::load_cuda_module().make_backend(index, parallel.tf32);
    backend_ = gpu_.get();
  });
}

std::unique_ptr<dist::Communicator> RunDevice::connect() {
  if (!gpu_) return launcher_.connect_cpu();
  auto world = dist::load_cuda_module().make_world(launcher_.control().split_control(0), *gpu_,
                                                   collective_timeout(parallel_) + kReportTime);
  return dist::watch(std::move(world), launcher_.watchdog().record(), "world");
}

}  // namespace safegrad
