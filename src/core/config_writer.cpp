#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
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

/// A visitor that spells every key that is given and hands it to `Output`:
///   text(name, text)  texts(name, texts)  begin(name) ... end()  of a section
///   begin_list(name)  begin_element(i) ... end()  end_list()
template <class Output>
class Speller {
 public:
  explicit Speller(Output& out) : out_(out) {}

  void key(std::string_view name, bool value) { out_.text(name, value ? "true" : "false"); }

  void key(std::string_view name, const std::string& value, Presence) {
    if (!value.empty()) out_.text(name, value);
  }

  template <class Enum>
  requires std::is_enum_v<Enum>
  void key(std::string_view name, Enum value) { out_.text(name, std::string(name_of(value))); }

  template <class Integer>
  requires std::is_integral_v<Integer>
  void key(std::string_view name, Integer value, const Range& range) {
    const bool as_word = value == 0 && !range.word_for_zero.empty();
    out_.text(name, as_word ? std::string(range.word_for_zero) : fmt::format("{}", value));
  }

  void key(std::string_view name, double value, const Range&) { out_.text(name, decimal(value)); }

  template <class Number>
  void key(std::string_view name, const std::optional<Number>& value, const Range& range) {
    if (value) key(name, *value, range);
  }

  void key(std::string_view name, const std::array<double, 2>& pair, const Range&) {
    out_.texts(name, {decimal(pair[0]), decimal(pair[1])});
  }

  void key(std::string_view name, const std::vector<std::string>& texts) {
    if (!texts.empty()) out_.texts(name, texts);
  }

  void key(std::string_view name, const std::vector<std::string>& names, Names) {
    key(name, names);
  }

  template <class Section>
  void section(std::string_view name, Section& value) {
    out_.begin(name);
    describe(*this, value);
    out_.end();
  }

  template <class Section>
  void section(std::string_view name, std::optional<Section>& value) {
    if (value) section(name, *value);
  }

  template <class Section>
  void list(std::string_view name, std::vector<Section>& sections) {
    if (sections.empty()) return;
    out_.begin_list(name);
    for (size_t i = 0; i < sections.size(); ++i) {
      out_.begin_element(i);
      describe(*this, sections[i]);
      out_.end();
    }
    out_.end_list();
  }

 private:
  Output& out_;
};

class YamlOutput {
 public:
  explicit YamlOutput(YAML::Emitter& out) : out_(out) {}
  void text(std::string_view name, const std::string& text) {
    out_ << YAML::Key << std::string(name) << YAML::Value << text;
  }
  void texts(std::string_view name, const std::vector<std::string>& texts) {
    out_ << YAML::Key << std::string(name) << YAML::Value << YAML::Flow << texts;
  }
  void begin(std::string_view name) {
    out_ << YAML::Key << std::string(name) << YAML::Value << YAML::BeginMap;
  }
  void begin_list(std::string_view name) {
    out_ << YAML::Key << std::string(name) << YAML::Value << YAML::BeginSeq;
  }
  void begin_element(size_t) { out_ << YAML::BeginMap; }
  void end() { out_ << YAML::EndMap; }
  void end_list() { out_ << YAML::EndSeq; }

 private:
  YAML::Emitter& out_;
};

class FlatOutput {
 public:
  void text(std::string_view name, const std::string& text) { values[path(name)] = text; }
  void texts(std::string_view name, const std::vector<std::string>& texts) {
    values[path(name)] = fmt::format("[{}]", fmt::join(texts, ", "));
  }
  void begin(std::string_view name) { prefixes_.push_back(path(name) + "."); }
  void begin_list(std::string_view name) { prefixes_.push_back(path(name)); }
  void begin_element(size_t i) { prefixes_.push_back(fmt::format("{}[{}].", prefixes_.back(), i)); }
  void end() { prefixes_.pop_back(); }
  void end_list() { prefixes_.pop_back(); }

  std::map<std::string, std::string> values;

 private:
  std::string path(std::string_view name) const {
    return fmt::format("{}{}", prefixes_.empty() ? "" : prefixes_.back(), name);
  }
  std::vector<std::string> prefixes_;
};

}  // namespace

std::string to_yaml(const RunConfig& config) {
  RunConfig copy = config;  // describe() serves readers too, so it takes members it could change
  YAML::Emitter emitter;
  YamlOutput out(emitter);
  Speller speller(out);
  emitter << YAML::BeginMap;
  describe(speller, copy);
  emitter << YAML::EndMap;
  return std::string(emitter.c_str()) + "\n";
}

std::map<std::string, std::string> config_values(const RunConfig& config) {
  RunConfig copy = config;
  FlatOutput out;
  Speller speller(out);
  describe(speller, copy);
  return out.values;
}

}  // namespace safegrad
