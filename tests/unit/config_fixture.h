// config_fixture.h: loads configs from text, for the tests of config.h.
#pragma once
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/config.h"
#include "core/error.h"
#include "unit/temp_folder.h"

namespace safegrad {

/// The least that load_config takes with the default rule; 6 lines.
inline constexpr char kMinimal[] = R"(model:
  path: models/tiny
data:
  task: task.safetensors
  align: align.safetensors
output: runs/minimal
)";

/// Loads text as a file named config.yaml, from a folder of its own.
class ConfigTest : public testing::Test {
 protected:
  RunConfig load(const std::string& text, const std::vector<std::string>& overrides = {}) const {
    test::write_text(file_, text);
    return load_config(file_, overrides);
  }

  /// The message of the ConfigError, with the file's path shortened to "config.yaml".
  std::string error_of(const std::string& text,
                       const std::vector<std::string>& overrides = {}) const {
    try {
      load(text, overrides);
    } catch (const ConfigError& error) {
      std::string message = error.what();
      EXPECT_EQ(message.find(file_), 0u) << "a message begins with the file: " << message;
      return message.replace(0, file_.size(), "config.yaml");
    }
    return "no error";
  }

  const test::TempFolder folder_;
  const std::string file_ = folder_ / "config.yaml";
};

}  // namespace safegrad
