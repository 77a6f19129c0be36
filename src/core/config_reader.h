// config_reader.h: fills a RunConfig from a tree, key by key, each with its type and range.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/yaml_tree.h"

namespace safegrad {

/// Mistakes in a config, so that one pass tells them all.
class ConfigMistakes {
 public:
  /// Runs `check`; a ConfigError that it throws is kept.
  void collect(const std::function<void()>& check);
  /// Throws ConfigError if there is a mistake: its own message, or of several "file: 2 mistakes:"
  /// and a line for each.
  void raise(const std::string& file) const;

 private:
  std::vector<std::string> messages_;
};

/// Every key that `tree` gives; the others keep their defaults. Looks at one key at a time:
/// contradictions between keys are left to load_config. A key with a mistake, which goes to
/// `mistakes`, keeps its default or part of its value.
RunConfig read_config(const YamlTree& tree, ConfigMistakes& mistakes);

}  // namespace safegrad
