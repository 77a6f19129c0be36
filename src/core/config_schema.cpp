#include "core/config_schema.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/config_keys.h"
#include "core/error.h"

namespace safegrad {
namespace {

using json = nlohmann::ordered_json;

// A number that may be spelled as one word instead.
json or_word(json number, std::string_view word) {
  if (word.empty()) return number;
  return {{"anyOf", json::array({std::move(number), json{{"const", word}}})}};
}

// 600, not 600.0.
json shown(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return static_cast<int64_t>(value);
  return value;
}

template <class Number>
json number_schema(const Range& range) {
  json schema = {{"type", std::is_integral_v<Number> ? "integer" : "number"}};
  if (!std::isinf(range.low))
    schema[range.low_open ? "exclusiveMinimum" : "minimum"] = shown(range.low);
  if (!std::isinf(range.high))
    schema[range.high_open ? "exclusiveMaximum" : "maximum"] = shown(range.high);
  return or_word(std::move(schema), range.word_for_zero);
}

template <class Number>
json number_default(Number value, const Range& range) {
  if (value == 0 && !range.word_for_zero.empty()) return range.word_for_zero;
  if constexpr (std::is_integral_v<Number>) return value;
  return shown(static_cast<double>(value));
}

/// A visitor that turns one section into the schema of an object.
class SchemaWriter {
 public:
  /// `prefix` is what the section's dotted paths begin with.
  explicit SchemaWriter(std::string prefix) : prefix_(std::move(prefix)) {}

  template <class Section>
  json write() {
    Section fresh;
    describe(*this, fresh);
    json schema = {
        {"type", "object"}, {"additionalProperties", false}, {"properties", properties_}};
    if (!required_.empty()) schema["required"] = required_;
    return schema;
  }

  void key(std::string_view name, bool value) {
    add(name, {{"type", "boolean"}, {"default", value}});
  }
  void key(std::string_view name, const std::string&, Presence presence) {
    add(name, {{"type", "string"}, {"minLength", 1}});
    if (presence == Presence::required) required_.push_back(name);
  }
  template <class Enum>
  requires std::is_enum_v<Enum>
  void key(std::string_view name, Enum value) {
    add(name, {{"enum", texts(names_of(Enum{}))}, {"default", name_of(value)}});
  }
  template <class Number>
  requires std::is_arithmetic_v<Number>
  void key(std::string_view name, Number value, const Range& range) {
    json schema = number_schema<Number>(range);
    schema["default"] = number_default(value, range);
    add(name, std::move(schema));
  }
  template <class Number>
  void key(std::string_view name, const std::optional<Number>&, const Range& range) {
    add(name, number_schema<Number>(range));
  }
  void key(std::string_view name, const std::array<double, 2>& pair, const Range& range) {
    add(name, {{"type", "array"},
               {"items", number_schema<double>(range)},
               {"minItems", 2},
               {"maxItems", 2},
               {"default", {shown(pair[0]), shown(pair[1])}}});
  }
  void key(std::string_view name, const std::vector<std::string>& values) {
    add(name, {{"type", "array"},
               {"items", {{"type", "string"}, {"minLength", 1}}},
               {"minItems", 1},
               {"default", values}});
  }
  void key(std::string_view name, const std::vector<std::string>& values, Names allowed) {
    add(name, {{"type", "array"},
               {"items", {{"enum", texts(allowed)}}},
               {"minItems", 1},
               {"uniqueItems", true},
               {"default", values}});
  }
  template <class Section>
  void section(std::string_view name, Section&) {
    add(name, SchemaWriter(path(name) + ".").write<Section>());
  }
  template <class Section>
  void section(std::string_view name, std::optional<Section>&) {
    add(name, SchemaWriter(path(name) + ".").write<Section>());
  }
  template <class Section>
  void list(std::string_view name, std::vector<Section>&) {
    add(name, {{"type", "array"}, {"items", SchemaWriter(path(name) + ".").write<Section>()}});
  }

 private:
  std::string path(std::string_view name) const { return prefix_ + std::string(name); }

  static json texts(Names names) {
    json list = json::array();
    for (const std::string_view name : names) list.push_back(name);
    return list;
  }

  void add(std::string_view name, json schema) {
    const auto meanings = key_meanings();
    const auto found = std::find_if(meanings.begin(), meanings.end(),
                                    [&](const KeyMeaning& m) { return m.key == path(name); });
    SAFEGRAD_CHECK(found != meanings.end(), UsageError, "{}: a key without a meaning", path(name));
    json described = {{"description", found->text}};
    described.update(schema);
    properties_[std::string(name)] = std::move(described);
  }

  std::string prefix_;
  json properties_ = json::object();
  std::vector<std::string_view> required_;
};

}  // namespace

std::string config_schema() {
  json schema = {{"$schema", "https://json-schema.org/draft/2020-12/schema"},
                 {"title", "safegrad config"}};
  schema.update(SchemaWriter("").write<RunConfig>());
  return schema.dump(2) + "\n";
}

}  // namespace safegrad
