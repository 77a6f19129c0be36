// mpi_ranks.cpp: tests run on CPU ranks over MPI.
#include "cpu/cpu_backend.h"
#include "dist/mpi_communicator.h"
#include "dist/rank_main.h"

namespace safegrad::testing {
namespace {

std::unique_ptr<dist::MpiEnvironment>& environment() {
  static std::unique_ptr<dist::MpiEnvironment> instance;
  return instance;
}

}  // namespace

std::string start_ranks(int* argc, char*** argv) {
  environment() = std::make_unique<dist::MpiEnvironment>(argc, argv);
  return "";
}

void stop_ranks() {
  environment().reset();
}

std::unique_ptr<dist::Communicator> world() {
  return dist::make_mpi_world();
}

const Backend& backend() {
  return cpu_backend();
}

}  // namespace safegrad::testing
