// mpi_launcher.cpp: ranks that MPI started, or a single one.
#include "dist/launcher.h"
#include "dist/mpi_communicator.h"

namespace safegrad::dist {
namespace {

class MpiLauncher : public Launcher {
 public:
  MpiLauncher(int* argc, char*** argv) : mpi_(argc, argv), control_(make_mpi_world()) {}

  ControlPlane& control() override { return *control_; }
  void check_cpu() const override {}
  std::unique_ptr<Communicator> connect_cpu() override { return make_mpi_world(); }
  [[noreturn]] void abort(int exit_code) override { abort_job(exit_code); }

 private:
  MpiEnvironment mpi_;
  std::unique_ptr<ControlPlane> control_;
};

}  // namespace

std::unique_ptr<Launcher> make_default_launcher(int* argc, char*** argv) {
  return std::make_unique<MpiLauncher>(argc, argv);
}

}  // namespace safegrad::dist
