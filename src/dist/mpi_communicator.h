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

/// All ranks of the job; collective. Throws InputError if the launcher's environment (Slurm, OpenMPI) promised
/// more ranks than MPI found, which happens when the launcher and this MPI do not know each other.
std::unique_ptr<Communicator> make_mpi_world();

}  // namespace safegrad::dist
