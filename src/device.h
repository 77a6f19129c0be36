// device.h: which device the ranks of a run compute on, and how they talk.
#pragma once
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/config.h"
#include "dist/launcher.h"

namespace safegrad {

/// parallel.timeout_seconds.
std::chrono::milliseconds collective_timeout(const ParallelSection& parallel);

/// This rank's device. Every rank of a job makes one with the same config.
class RunDevice {
 public:
  /// `auto` is cuda where every rank has the GPU module and sees a GPU, cpu where none does.
  /// Collective; throws JobFailed on all ranks: ranks that see different devices (with their
  /// numbers), more ranks on a machine than GPUs, a module or a launcher that cannot.
  RunDevice(const ParallelSection& parallel, dist::Launcher& launcher,
            std::vector<std::string>& warnings);

  const Backend& backend() const { return *backend_; }
  /// All ranks of the job, for tensors on the backend's device: over MPI, or NCCL. Collective.
  std::unique_ptr<dist::Communicator> connect();

 private:
  const ParallelSection parallel_;
  dist::Launcher& launcher_;
  std::unique_ptr<Backend> gpu_;  // null: the cores
  const Backend* backend_;
};

}  // namespace safegrad
