#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <fmt/format.h>
#include <yaml-cpp/emitter.h>
#include <yaml-cpp/emittermanip.h>
#include <yaml-cpp/stlemitter.h>

#include "core/config.h"
#include "core/config_keys.h"

namespace safegrad {
namespace {

/// Shortest text that reads back as `x`, with a dot: YAML 1.1 readers such as PyYAML take 1e-05 for
/// a text.
std::string decimal(double x) {
  std::string text = fmt::format("{}", x);
  if (text.find('.') == std::string::npos) text.insert(std::min(text.find('e'), text.size()), ".0");
  return text;
}

/// A visitor that writes every key that is given.
class Writer {
 public:
  explicit Writer(YAML::Emitter& out) : out_(out) {}

  void key(std::string_view name, bool value) { write(name, value ? "true" : "false"); }

  void key(std::string_view name, const std::string& value, Presence) {
    if (!value.empty()) write(name, value);
  }

  template <class Enum>
  requires std::is_enum_v<Enum>
  void key(std::string_view name, Enum value) { write(name, std::string(name_of(value))); }

  template <class Integer>
  requires std::is_integral_v<Integer>
  void key(std::string_view name, Integer value, const Range& range) {
    const bool as_word = value == 0 && !range.word_for_zero.empty();
    write(name, as_word ? std::string(range.word_for_zero) : fmt::format("{}", value));
  }

  void key(std::string_view name, double value, const Range&) { write(name, decimal(value)); }

  template <class Number>
  void key(std::string_view name, const std::optional<Number>& value, const Range& range) {
    if (value) key(name, *value, range);
  }

  void key(std::string_view name, const std::array<double, 2>& pair, const Range&) {
    write_list(name, {decimal(pair[0]), decimal(pair[1])});
  }

  void key(std::string_view name, const std::vector<std::string>& texts) {
    if (!texts.empty()) write_list(name, texts);
  }

  void key(std::string_view name, const std::vector<std::string>& names, Names) {
    key(name, names);
  }

  template <class Section>
  void section(std::string_view name, Section& value) {
    out_ << YAML::Key << std::string(name) << YAML::Value;
    write_section(value);
  }

  template <class Section>
  void section(std::string_view name, std::optional<Section>& value) {
    if (value) section(name, *value);
  }

  template <class Section>
  void list(std::string_view name, std::vector<Section>& sections) {
    if (sections.empty()) return;
    out_ << YAML::Key << std::string(name) << YAML::Value << YAML::BeginSeq;
    for (Section& section : sections) write_section(section);
    out_ << YAML::EndSeq;
  }

  template <class Section>
  void write_section(Section& section) {
    out_ << YAML::BeginMap;
    describe(*this, section);
    out_ << YAML::EndMap;
  }

 private:
  void write(std::string_view name, const std::string& text) {
    out_ << YAML::Key << std::string(name) << YAML::Value << text;
  }

  void write_list(std::string_view name, const std::vector<std::string>& texts) {
    out_ << YAML::Key << std::string(name) << YAML::Value << YAML::Flow << texts;
  }

  YAML::Emitter& out_;
};

}  // namespace

std::string to_yaml(const RunConfig& config) {
  RunConfig copy = config;  // describe() serves readers too, so it takes members it could change
  YAML::Emitter out;
  Writer(out).write_section(copy);
  return std::string(out.c_str()) + "\n";
}

}  // namespace safegrad
