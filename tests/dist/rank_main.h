// rank_main.h: runs GoogleTest on every rank of a job; rank 0 prints, failures of others are
// printed with their rank.
#pragma once
#include <memory>
#include <string>

#include "core/backend.h"
#include "dist/communicator.h"

namespace safegrad::testing {

// What the tests run on: mpi_ranks.cpp (CPU ranks over MPI) or gpu_ranks.cpp is linked in.

/// Joins the job. A text says why the tests cannot run here, the same on every rank.
std::string start_ranks(int* argc, char*** argv);
/// Leaves the job; no communicator is left.
void stop_ranks();
/// A fresh communicator over all ranks of the test job. Collective.
std::unique_ptr<dist::Communicator> world();
/// The device of this rank.
const Backend& backend();

}  // namespace safegrad::testing
