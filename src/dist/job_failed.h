// job_failed.h: how a whole job ends on an error that its ranks have agreed on.
#pragma once
#include <stdexcept>
#include <string>

namespace safegrad::dist {

/// Thrown on every rank by agree(). what() is the error's text on the rank that speaks for the job,
/// empty on the others.
class JobFailed : public std::runtime_error {
 public:
  JobFailed(const std::string& message, int exit_code)
      : std::runtime_error(message), exit_code_(exit_code) {}
  int exit_code() const noexcept { return exit_code_; }

 private:
  int exit_code_;
};

}  // namespace safegrad::dist
