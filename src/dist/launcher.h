// launcher.h: who started the ranks, and so how they find each other.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "dist/communicator.h"
#include "dist/watchdog.h"

namespace safegrad::dist {

/// The ranks of a job, before they are connected. One a process, in main; it outlives what it
/// makes.
class Launcher {
 public:
  virtual ~Launcher() = default;
  /// Sees what goes through control() and connect_cpu(). It guards the ranks from when they have
  /// met, with deadlines of the launcher's own; a run sets its own.
  Watchdog& watchdog() { return watchdog_; }
  /// All ranks of the job. An own one for a communicator to keep: control().split_control(0).
  virtual ControlPlane& control() = 0;
  /// Throws ConfigError where the ranks of this job cannot exchange CPU tensors. Does not
  /// communicate.
  virtual void check_cpu() const = 0;
  /// All ranks of the job, for CPU tensors. Throws as check_cpu.
  virtual std::unique_ptr<Communicator> connect_cpu() = 0;
  /// Ends this process with the exit code, without waiting for anybody; with it, at once or through
  /// whoever started it, all the others.
  [[noreturn]] virtual void abort(int exit_code) = 0;

 protected:
  /// `end_job`: as abort(2), for the watchdog's thread, also while the launcher is being destroyed.
  explicit Launcher(std::function<void()> end_job) : watchdog_(std::move(end_job)) {}

 private:
  Watchdog watchdog_;
};

/// What environment variables say about a job whose ranks meet at a store.
struct StoreJob {
  int rank = 0, size = 1;
  std::string host;
  uint16_t port = 0;
  bool hosted_by_agent = false;  ///< torchrun's agent holds the store; else rank 0 does
  int attempt = 0;               ///< torchrun's restarts so far
};

/// The value of an environment variable, or null.
using Environment = std::function<const char*(const char* name)>;

/// torchrun's RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, or what srun says about the rank with
/// MASTER_ADDR and MASTER_PORT; nothing where none of this is set, or MPI started the rank. Throws
/// InputError that names what is missing or not a number in range.
std::optional<StoreJob> find_store_job(const Environment& environment);

/// Throws InputError where this process is the only rank that was found, and what started it says
/// that there are more: ranks that do not know of each other would each train by themselves. Asked
/// are OMPI_COMM_WORLD_SIZE, PMI_SIZE (MPICH, Intel MPI, srun --mpi=pmi2), MV2_COMM_WORLD_SIZE and
/// Slurm's SLURM_STEP_NUM_TASKS, the first that is set: the launcher inside speaks before the one
/// around it. SLURM_NTASKS is none of them, a batch script has it too and is one process.
/// `remedy`: what to do, as the end of the message.
void check_promised_ranks(int found, const Environment& environment, const std::string& remedy);

/// Connects to the job's store, or hosts it. Throws CommError where nobody answers in time.
std::unique_ptr<Launcher> make_store_launcher(const StoreJob& job);

/// MPI, in a build with MPI; else a single rank. Throws as check_promised_ranks.
std::unique_ptr<Launcher> make_default_launcher(int* argc, char*** argv);

/// make_store_launcher where the environment names a store, else make_default_launcher.
std::unique_ptr<Launcher> make_launcher(int* argc, char*** argv);

}  // namespace safegrad::dist
