// yaml_tree.h: a YAML file with the overrides of the command line laid over it.
#pragma once
#include <string>
#include <string_view>

#include "core/yaml_parser.h"

namespace safegrad {

/// A file of one YAML map, with overrides.
class YamlTree {
 public:
  /// Throws ConfigError if the file cannot be read, is empty, no map, or refused by parse_yaml.
  explicit YamlTree(std::string file);

  /// `assignment` is KEY=VALUE, KEY is dotted, VALUE is YAML; sections on the way are made if need
  /// be. Throws ConfigError if it is malformed or leads through something that is no section.
  void set(std::string_view assignment);

  const YamlValue& root() const { return root_; }
  /// The value of a dotted key such as "probe[1].name"; nullptr if absent or unset.
  const YamlValue* find(std::string_view key) const;
  /// Where `key` was given: "line 12" or "--set". For messages about two keys.
  std::string origin(std::string_view key) const;
  /// What messages about `key` begin with, as fail() below.
  std::string place(std::string_view key) const;

  /// Throws ConfigError "file:12: key: message", or "file: --set key: message" where line says so.
  [[noreturn]] void fail(int line, std::string_view key, std::string_view message) const;
  /// The same, with the line of the key or of the nearest section above it that was given.
  [[noreturn]] void fail(std::string_view key, std::string_view message) const;

 private:
  std::string file_;
  YamlValue root_;
};

}  // namespace safegrad
