// lost_rank.cpp: a job in which one rank stops taking part, for tests of what the others do.
// Usage: mpirun -n N lost_rank WAY FOLDER
#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include "dist/launcher.h"

namespace {

constexpr int kLost = 1;  // the rank that stops taking part

}  // namespace

int main(int argc, char** argv) {
  using namespace std::chrono_literals;
  auto launcher = safegrad::dist::make_launcher(&argc, &argv);
  const std::string way = argv[1];
  auto world = launcher->connect_cpu();
  launcher->watchdog().guard({world->rank(), world->size(), 2s, "the test's deadline", argv[2]});
  const bool lost = world->rank() == kLost;

  for (int step = 1; step <= 3; ++step) {
    world->about("step " + std::to_string(step));
    world->barrier();
  }
  if (lost && way == "stops") std::raise(SIGSTOP);
  if (lost && way == "computes") std::this_thread::sleep_for(600s);
  if (lost && way == "leaves") return 0;
  world->about("step 4");
  if (lost && way == "differs") {
    world->broadcast("", 0);
  } else {
    world->barrier();
  }
  world->barrier();
  std::puts("went on");
  return 0;
}
