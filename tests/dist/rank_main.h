// rank_main.h: runs GoogleTest on every rank of an MPI job; rank 0 prints, failures of others are
// printed with their rank.
#pragma once
#include <memory>

#include "dist/communicator.h"

namespace safegrad::testing {

/// A fresh communicator over all ranks of the test job.
std::unique_ptr<dist::Communicator> world();

}  // namespace safegrad::testing
