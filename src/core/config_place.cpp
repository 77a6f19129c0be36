#include "core/config_place.h"

#include "core/yaml_tree.h"

namespace safegrad {

std::string place_of(const std::string& path, const std::vector<std::string>& overrides,
                     const std::string& key) {
  YamlTree tree(path);
  for (const std::string& assignment : overrides) tree.set(assignment);
  return tree.place(key);
}

}  // namespace safegrad
