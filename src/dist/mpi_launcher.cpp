// mpi_launcher.cpp: ranks that MPI started, or a single one.
#include <chrono>
#include <cstdlib>
#include <exception>
#include <utility>

#include <unistd.h>

#include "dist/launcher.h"
#include "dist/mpi_communicator.h"
#include "dist/watched_communicator.h"

namespace safegrad::dist {
namespace {

constexpr std::chrono::minutes kStartDeadline(10);  // until the run's own is known

class MpiLauncher : public Launcher {
 public:
  MpiLauncher(int* argc, char*** argv)
      : Launcher(end_late_job),
        mpi_(argc, argv),
        control_(watch(std::unique_ptr<ControlPlane>(make_mpi_world()), watchdog().record(),
                       "control")) {
    check_promised_ranks(
        control_->size(), [](const char* name) { return std::getenv(name); },
        "launcher and MPI do not know each other: take the mpirun of the OpenMPI that this program "
        "was built with; under Slurm srun --mpi=pmix, or mpirun inside the allocation");
    watchdog().guard({control_->rank(), control_->size(), kStartDeadline,
                      "until parallel.timeout_seconds is read", ""});
  }

  // MPI waits for all ranks to leave.
  ~MpiLauncher() override {
    if (std::uncaught_exceptions() > 0) return;
    try {
      control_->about("leaving");
      control_->barrier();
      // MPI may wait for ranks once more as it ends.
      Flight end;
      end.group = "MPI";
      end.group_number = 1;
      end.operation = "end";
      watchdog().record().await(watchdog().record().begin(std::move(end)));
    } catch (const std::exception&) {
      // A rank that has got this far has done its part.
    }
  }

  ControlPlane& control() override { return *control_; }
  void check_cpu() const override {}
  std::unique_ptr<Communicator> connect_cpu() override {
    return watch(make_mpi_world(), watchdog().record(), "world");
  }
  [[noreturn]] void abort(int exit_code) override { abort_job(exit_code); }

 private:
  // MPI allows this thread no call, and the main thread is in one that does not return. OpenMPI's
  // abort is a message to the launcher that needs nothing of the main thread; should it not return,
  // the alarm ends this process.
  static void end_late_job() {
    alarm(10);
    abort_job(2);
  }

  MpiEnvironment mpi_;
  std::unique_ptr<ControlPlane> control_;
};

}  // namespace

std::unique_ptr<Launcher> make_default_launcher(int* argc, char*** argv) {
  return std::make_unique<MpiLauncher>(argc, argv);
}

}  // namespace safegrad::dist
