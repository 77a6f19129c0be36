// config_reader.h: fills a RunConfig from a tree, key by key, each with its type and range.
#pragma once
#include "core/config.h"
#include "core/yaml_tree.h"

namespace safegrad {

/// Every key that `tree` gives; the others keep their defaults. Looks at one key at a time:
/// contradictions between keys are left to load_config. Throws ConfigError.
RunConfig read_config(const YamlTree& tree);

}  // namespace safegrad
