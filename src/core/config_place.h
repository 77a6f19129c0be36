// config_place.h: where a config names what an error is about.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"

namespace safegrad {

/// A file or folder that a key of the config names, or its value, does not go with what it is used
/// for. what() is "key: message".
class NamedFileError : public InputError {
 public:
  NamedFileError(std::string key, const std::string& message)
      : InputError(fmt::format("{}: {}", key, message)), key_(std::move(key)), message_(message) {}
  const std::string& key() const noexcept { return key_; }
  const std::string& message() const noexcept { return message_; }

 private:
  std::string key_, message_;
};

/// Where a config gives `key`, as messages begin: "my.yaml:9: data.task" or "my.yaml: --set
/// data.task". `path` and `overrides` of a load_config that has succeeded.
std::string place_of(const std::string& path, const std::vector<std::string>& overrides,
                     const std::string& key);

}  // namespace safegrad
