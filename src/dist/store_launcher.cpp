// store_launcher.cpp: ranks that environment variables describe, and that meet at a TCPStore.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "core/error.h"
#include "dist/launcher.h"
#include "dist/store_control.h"
#include "dist/watched_communicator.h"

namespace safegrad::dist {
namespace {

using namespace std::chrono_literals;

// While rank 0 writes a model, the others wait in an exchange.
constexpr std::chrono::milliseconds kExchangeDeadline = 30min;
// From the first rank's start to the last one's.
constexpr std::chrono::milliseconds kConnectDeadline = 5min;
// From the first rank's end to the last one's, after a last exchange.
constexpr std::chrono::milliseconds kLeaveDeadline = 30s;

c10::intrusive_ptr<c10d::TCPStore> open_store(const StoreJob& job) {
  c10d::TCPStoreOptions options;
  options.port = job.port;
  options.isServer = job.rank == 0 && !job.hosted_by_agent;
  options.waitWorkers = false;  // the first exchange waits, and names who is missing
  options.timeout = kConnectDeadline;
  try {
    return c10::make_intrusive<c10d::TCPStore>(job.host, options);
  } catch (const c10::Error& e) {
    throw CommError(
        fmt::format("rank {} of {}: {} the store at {}:{} (MASTER_ADDR, MASTER_PORT): {}", job.rank,
                    job.size, options.isServer ? "could not host" : "did not reach", job.host,
                    job.port, e.what_without_backtrace()));
  }
}

class StoreLauncher : public Launcher {
 public:
  explicit StoreLauncher(const StoreJob& job)
      : Launcher([] { std::_Exit(2); }),
        job_(job),
        prefix_(fmt::format("safegrad/{}", job.attempt)),
        store_(open_store(job)),
        control_(watch(
            make_store_control({store_, prefix_ + "/world", job.rank, job.size}, kExchangeDeadline),
            watchdog().record(), "control")) {}

  // The store goes with rank 0, which may be the first to leave its last exchange.
  ~StoreLauncher() override {
    if (job_.hosted_by_agent) return;
    try {
      if (job_.rank != 0) {
        store_->set(left(job_.rank), std::vector<uint8_t>());
        return;
      }
      std::vector<std::string> keys;
      for (int r = 1; r < job_.size; ++r) keys.push_back(left(r));
      if (!keys.empty()) store_->wait(keys, kLeaveDeadline);
    } catch (const std::exception&) {
      // Whoever has not left by now has failed, and says so itself.
    }
  }

  ControlPlane& control() override { return *control_; }

  void check_cpu() const override {
    throw ConfigError(
        "parallel.device: CPU ranks communicate over MPI, and these were started without it; start "
        "with mpirun or srun --mpi=pmix");
  }

  std::unique_ptr<Communicator> connect_cpu() override {
    check_cpu();
    return nullptr;
  }

  // Whoever waits for this rank is ended by torchrun or srun, which see its exit code, or fails as
  // the store goes with rank 0.
  [[noreturn]] void abort(int exit_code) override {
    std::fflush(nullptr);
    std::_Exit(exit_code);
  }

 private:
  std::string left(int rank) const { return fmt::format("{}/left/{}", prefix_, rank); }

  StoreJob job_;
  std::string prefix_;
  c10::intrusive_ptr<c10d::TCPStore> store_;
  std::unique_ptr<ControlPlane> control_;
};

}  // namespace

std::unique_ptr<Launcher> make_store_launcher(const StoreJob& job) {
  return std::make_unique<StoreLauncher>(job);
}

}  // namespace safegrad::dist
