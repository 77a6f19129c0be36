// mpi_communicator.h: collectives for CPU tensors over MPI, the embedded default.
#pragma once
#include <memory>

#include "dist/communicator.h"

namespace safegrad::dist {

/// Starts MPI for the life of the object. One a process, in main.
class MpiEnvironment {
 public:
  MpiEnvironment(int* argc, char*** argv);
  ~MpiEnvironment();
  MpiEnvironment(const MpiEnvironment&) = delete;
  MpiEnvironment& operator=(const MpiEnvironment&) = delete;
};

/// Ends every rank of the job with this exit code, at once.
[[noreturn]] void abort_job(int exit_code);

/// All ranks of the job, as MPI found them. Collective.
std::unique_ptr<Communicator> make_mpi_world();

}  // namespace safegrad::dist
