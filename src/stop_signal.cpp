#include "stop_signal.h"

#include <atomic>
#include <csignal>
#include <cstdint>

#include <time.h>

namespace safegrad {
namespace {

constexpr int kSignals[] = {SIGINT, SIGTERM, SIGUSR1};
constexpr int64_t kSameRequest_ns = 1'000'000'000;

// The one thing that a signal handler can reach; only it writes. Nanoseconds of the monotonic clock
// at the first request, 0 before it.
std::atomic<int64_t> requested_ns = 0;
static_assert(std::atomic<int64_t>::is_always_lock_free, "a signal handler must not wait");

// Everything here is allowed in a signal handler.
void remember(int signal) {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  const int64_t now_ns = int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
  int64_t first_ns = 0;
  if (requested_ns.compare_exchange_strong(first_ns, now_ns)) return;
  if (now_ns - first_ns < kSameRequest_ns) return;
  struct sigaction standard {};
  standard.sa_handler = SIG_DFL;
  sigaction(signal, &standard, nullptr);
  raise(signal);  // takes effect when this handler returns
}

}  // namespace

void catch_stop_signals() {
  struct sigaction entry {};
  entry.sa_handler = remember;
  entry.sa_flags = SA_RESTART;  // no system call of the run fails on account of a signal
  sigemptyset(&entry.sa_mask);
  for (int signal : kSignals) sigaction(signal, &entry, nullptr);
}

bool stop_requested() {
  return requested_ns != 0;
}

}  // namespace safegrad
