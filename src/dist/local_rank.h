// local_rank.h: which of the ranks that share a machine this one is.
#pragma once
#include "dist/control_plane.h"

namespace safegrad::dist {

struct LocalRank {
  int rank = 0;   ///< [0, ranks), in the order of ranks
  int ranks = 1;  ///< of this job on this machine
};

/// Ranks share a machine where host name and boot are the same; containers with host names of their
/// own count as machines. Communicates one word a rank.
LocalRank find_local_rank(ControlPlane& control);

/// Throws InputError with the numbers and what to change where this machine has fewer visible GPUs
/// than ranks. `visible` is the text of CUDA_VISIBLE_DEVICES, or null. Does not communicate: call
/// it under agree().
void check_enough_gpus(const ControlPlane& control, const LocalRank& local, int gpus,
                       const char* visible);

}  // namespace safegrad::dist
