// verbose.h: what -v adds: who computes where, which files were opened, where the time went before
// the first step.
#pragma once
#include <chrono>
#include <string>

#include "dist/control_plane.h"
#include "job.h"

namespace safegrad {

/// A line for each rank: host, process, device, threads. Collective.
std::string ranks_in_full(dist::ControlPlane& control, const Backend& backend);

/// A line for each file that the job opened: weights, data, probes, with its size.
std::string files_in_full(const Job& job);

/// Times of parts that follow each other, on this rank.
class PartTimes {
 public:
  /// The time since the last call, or since this object was made, was for `part`.
  void end(const std::string& part);
  /// "before the first step: 4.03 s (opening 0.41 s, weights and reference 3.10 s, ...)" and a
  /// newline.
  std::string text() const;

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now(), last_ = start_;
  std::string parts_;
};

}  // namespace safegrad
