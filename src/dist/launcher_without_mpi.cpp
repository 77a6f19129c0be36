// launcher_without_mpi.cpp: takes the place of mpi_launcher.cpp in a build without MPI: one rank.
#include <cstdio>
#include <cstdlib>

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
  check_promised_ranks(
      1, [](const char* name) { return std::getenv(name); },
      "this program was built without MPI (SAFEGRAD_MPI=OFF): start them with torchrun, under srun "
      "set MASTER_ADDR and MASTER_PORT, or build with MPI");
  return std::make_unique<SoloLauncher>();
}

}  // namespace safegrad::dist
