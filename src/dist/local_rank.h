// local_rank.h: which of the ranks that share a machine this one is.
#pragma once
#include <cstdint>
#include <vector>

#include "dist/control_plane.h"

namespace safegrad::dist {

struct LocalRank {
  int rank = 0;   ///< [0, ranks), in the order of ranks
  int ranks = 1;  ///< of this job on this machine
};

/// Ranks share a machine where host name and boot are the same; containers with host names of their
/// own count as machines. Communicates one word a rank.
LocalRank find_local_rank(ControlPlane& control);

/// Which of `gpus`, those that this rank sees, by identity, is its own: of several the one of its
/// place among the ranks of its machine; where a rank sees just one (Slurm's --gpus-per-task), that
/// one. Collective; throws JobFailed with the numbers and what to change on every rank: a rank sees
/// no GPU, a machine has more ranks than GPUs, or two ranks have the same one. `visible` is the
/// text of CUDA_VISIBLE_DEVICES, or null.
int choose_gpu(ControlPlane& control, const LocalRank& local, const std::vector<uint64_t>& gpus,
               const char* visible);

}  // namespace safegrad::dist
