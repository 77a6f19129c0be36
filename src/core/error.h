// error.h: the exception types of the project; every message says what is wrong, where, and what to
// do.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>

#include <fmt/format.h>

namespace safegrad {

/// Base of everything the project throws. exit_code() is the process's exit status.
class Error : public std::runtime_error {
 public:
  Error(std::string message, int exit_code)
      : std::runtime_error(std::move(message)), exit_code_(exit_code) {}
  int exit_code() const noexcept { return exit_code_; }

 private:
  int exit_code_;
};

/// A mistake in what the user gave (config, data, model folder, launch): exit code 1.
class InputError : public Error {
 public:
  explicit InputError(std::string message) : Error(std::move(message), 1) {}
};

/// A key of the YAML config is unknown, duplicate, missing, mistyped or out of range.
class ConfigError : public InputError {
  using InputError::InputError;
};

/// A token file is damaged, does not fit the model, or is empty.
class DataError : public InputError {
  using InputError::InputError;
};

/// A model folder or safetensors file is damaged, incomplete or of an unknown architecture.
class ModelError : public InputError {
  using InputError::InputError;
};

/// A failure while running (disk, network, a lost rank): exit code 2.
class RunError : public Error {
 public:
  explicit RunError(std::string message) : Error(std::move(message), 2) {}
};

/// A collective failed; the message names rank, operation and the backend's own text.
class CommError : public RunError {
  using RunError::RunError;
};

/// A caller broke a contract: a bug in this program, not a user's mistake.
class UsageError : public RunError {
  using RunError::RunError;
};

}  // namespace safegrad

/// Throws `type` with the formatted message unless `condition` holds.
#define SAFEGRAD_CHECK(condition, type, ...)            \
  do {                                                  \
    if (!(condition)) [[unlikely]]                      \
      throw ::safegrad::type(fmt::format(__VA_ARGS__)); \
  } while (false)
