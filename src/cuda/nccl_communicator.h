// nccl_communicator.h: collectives for CUDA tensors over NCCL.
#pragma once
#include <cstdint>
#include <memory>

#include "cuda/nccl_options.h"
#include "dist/communicator.h"

namespace safegrad::cuda {

/// The ranks of `control`, each on its own GPU `device`. Gathers and reductions run on a stream
/// each, behind what was on the current stream when they were called. Work::wait() and all_reduce
/// make the current stream wait, not the host; the host waits in all_gather_scalars alone, which
/// traffic() counts. The order of summation is NCCL's. A single rank uses no NCCL. Collective.
/// Throws CommError where a rank has not come by the deadline.
std::unique_ptr<dist::Communicator> make_nccl_world(std::unique_ptr<dist::ControlPlane> control,
                                                    int device, NcclOptions options);

}  // namespace safegrad::cuda
