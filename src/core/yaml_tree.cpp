#include "core/yaml_tree.h"

#include <cstddef>
#include <cstdint>
#include <utility>

#include <fmt/format.h>

#include "core/error.h"
#include "core/files.h"

namespace safegrad {
namespace {

constexpr int64_t kMaxBytes = int64_t{1} << 20;  // a config is a few KiB; more is another file

/// Takes the first step of a dotted path ("probe[1]" of "probe[1].name") off `path`.
std::string_view take_step(std::string_view& path) {
  const size_t dot = path.find('.');
  const std::string_view step = path.substr(0, dot);
  path = dot == std::string_view::npos ? std::string_view{} : path.substr(dot + 1);
  return step;
}

YamlValue& find_or_add(YamlValue& map, std::string_view member) {
  for (YamlValue& child : map.children) {
    if (child.key == member) return child;
  }
  YamlValue& added = map.children.emplace_back();
  added.kind = YamlValue::Kind::map;
  added.line = YamlValue::kFromSet;
  added.key = member;
  return added;
}

/// The value that a step of a path leads to; nullptr if there is none.
const YamlValue* follow(const YamlValue& from, std::string_view step) {
  const size_t bracket = step.find('[');
  const YamlValue* value = from.find(step.substr(0, bracket));
  if (!value || bracket == std::string_view::npos) return value;
  size_t index = 0;
  for (const char c : step.substr(bracket + 1)) {
    if (c >= '0' && c <= '9') index = index * 10 + static_cast<size_t>(c - '0');
  }
  return index < value->children.size() ? &value->children[index] : nullptr;
}

}  // namespace

YamlTree::YamlTree(std::string file) : file_(std::move(file)) {
  const std::string text =
      rethrow_as<ConfigError>([&] { return read_small_file(file_, kMaxBytes); });
  root_ = parse_yaml(file_, {}, text);
  if (root_.kind == YamlValue::Kind::null) {
    fail(YamlValue::kNowhere, {}, "the file is empty; a config is a map of sections such as model");
  }
  if (root_.kind != YamlValue::Kind::map) {
    fail(root_.line, {}, fmt::format("got {}, expected a map of sections", shown(root_)));
  }
  root_.line = YamlValue::kNowhere;
}

void YamlTree::set(std::string_view assignment) {
  const size_t equals = assignment.find('=');
  const std::string_view key = assignment.substr(0, equals);
  if (equals == std::string_view::npos || key.empty() || key.front() == '.' || key.back() == '.' ||
      key.find("..") != std::string_view::npos) {
    fail(YamlValue::kFromSet, assignment,
         "expected KEY=VALUE with a dotted key, such as --set optimizer.lr=2e-5");
  }
  if (key.find('[') != std::string_view::npos) {
    fail(YamlValue::kFromSet, key, "an item of a list has no key; set the list as a whole");
  }
  const std::string_view text = assignment.substr(equals + 1);
  if (text.find_first_not_of(" \t\n") == std::string_view::npos) {
    // Most often an empty shell variable; it must not quietly become the default.
    fail(YamlValue::kFromSet, key,
         "got nothing after =; to take the key out of the file write null");
  }
  YamlValue value = parse_yaml(file_, key, text);
  value.line = YamlValue::kFromSet;
  if (value.kind == YamlValue::Kind::null) value.kind = YamlValue::Kind::unset;

  YamlValue* target = &root_;
  for (std::string_view rest = key; !rest.empty();) {
    if (target->kind == YamlValue::Kind::null || target->kind == YamlValue::Kind::unset) {
      target->kind = YamlValue::Kind::map;
    }
    if (target->kind != YamlValue::Kind::map) {
      fail(YamlValue::kFromSet, key,
           fmt::format("{} is {}; set it as a whole", target->key, shown(*target)));
    }
    target = &find_or_add(*target, take_step(rest));
  }
  value.key = target->key;
  *target = std::move(value);
}

const YamlValue* YamlTree::find(std::string_view key) const {
  const YamlValue* value = &root_;
  while (value && !key.empty()) value = follow(*value, take_step(key));
  return value && value->kind != YamlValue::Kind::unset ? value : nullptr;
}

std::string YamlTree::origin(std::string_view key) const {
  const YamlValue* value = find(key);
  if (!value) return "not given";
  return value->line == YamlValue::kFromSet ? "--set" : fmt::format("line {}", value->line);
}

void YamlTree::fail(int line, std::string_view key, std::string_view message) const {
  fail_at(file_, line, key, message);
}

std::string YamlTree::place(std::string_view key) const {
  const YamlValue* value = &root_;
  for (std::string_view rest = key; !rest.empty();) {
    const YamlValue* next = follow(*value, take_step(rest));
    if (!next) break;
    value = next;
  }
  return place_at(file_, value->line, key);
}

void YamlTree::fail(std::string_view key, std::string_view message) const {
  throw ConfigError(fmt::format("{}: {}", place(key), message));
}

}  // namespace safegrad
