#include "stop_signal.h"

#include <csignal>

namespace safegrad {
namespace {

// The one thing that a signal handler can reach; only it writes.
volatile std::sig_atomic_t requested = 0;

constexpr int kSignals[] = {SIGTERM, SIGUSR1};

void set_action(void (*action)(int)) {
  struct sigaction entry {};
  entry.sa_handler = action;
  entry.sa_flags = SA_RESTART;  // no system call of the run fails on account of a signal
  sigemptyset(&entry.sa_mask);
  for (int signal : kSignals) sigaction(signal, &entry, nullptr);
}

void remember(int) {
  requested = 1;
  set_action(SIG_DFL);
}

}  // namespace

void catch_stop_signals() {
  set_action(remember);
}

bool stop_requested() {
  return requested != 0;
}

}  // namespace safegrad
