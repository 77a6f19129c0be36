// launcher_without_mpi.cpp: takes the place of mpi_launcher.cpp in a build without MPI: one rank.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "core/error.h"
#include "dist/launcher.h"
#include "dist/solo_communicator.h"

namespace safegrad::dist {
namespace {

class SoloLauncher : public Launcher {
 public:
  SoloLauncher() : Launcher([] { std::_Exit(2); }) {}
  ControlPlane& control() override { return control_; }
  void check_cpu() const override {}
  std::unique_ptr<Communicator> connect_cpu() override {
    return std::make_unique<SoloCommunicator>();
  }
  [[noreturn]] void abort(int exit_code) override {
    std::fflush(nullptr);
    std::_Exit(exit_code);
  }

 private:
  SoloCommunicator control_;
};

}  // namespace

std::unique_ptr<Launcher> make_default_launcher(int*, char***) {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* value = std::getenv(name);
    const int promised = value ? std::atoi(value) : 1;
    SAFEGRAD_CHECK(promised <= 1, InputError,
                   "{} ranks were started ({}), but this program was built without MPI "
                   "(SAFEGRAD_MPI=OFF), so they do not know of each other; start them with "
                   "torchrun, under srun set MASTER_ADDR and MASTER_PORT, or build with MPI",
                   promised, name);
  }
  return std::make_unique<SoloLauncher>();
}

}  // namespace safegrad::dist
