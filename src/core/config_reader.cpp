#include "core/config_reader.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/config_keys.h"
#include "core/error.h"
#include "core/json.h"
#include "core/key_lister.h"

namespace safegrad {
namespace {

/// "> 0", ">= 1 or all", "in [0, 1)".
std::string text_of(const Range& range) {
  if (std::isinf(range.high)) {
    return fmt::format("{} {}{}{}", range.low_open ? ">" : ">=", range.low,
                       range.word_for_zero.empty() ? "" : " or ", range.word_for_zero);
  }
  return fmt::format("in {}{}, {}{}", range.low_open ? '(' : '[', range.low, range.high,
                     range.high_open ? ')' : ']');
}

/// A visitor whose `reader` reads on after a mistake in a key.
template <class Reader>
struct EachKey {
  Reader& reader;
  ConfigMistakes& mistakes;

  template <class Member, class... Rule>
  void key(std::string_view name, Member& out, const Rule&... rule) {
    mistakes.collect([&] { reader.key(name, out, rule...); });
  }
  template <class Section>
  void section(std::string_view name, Section& out) {
    mistakes.collect([&] { reader.section(name, out); });
  }
  template <class Section>
  void list(std::string_view name, std::vector<Section>& out) {
    mistakes.collect([&] { reader.list(name, out); });
  }
};

/// Reads one section of the tree.
class SectionReader {
 public:
  /// `path` is the section's own, empty for the whole config.
  SectionReader(const YamlTree& tree, const YamlValue& map, std::string path,
                ConfigMistakes& mistakes)
      : tree_(tree), map_(map), path_(std::move(path)), mistakes_(mistakes) {}

  template <class Section>
  void read(Section& section) {
    const KeyLister keys = list_keys<Section>(dotted(""));
    for (const YamlValue& member : map_.children) {
      if (std::find(keys.own.begin(), keys.own.end(), member.key) == keys.own.end()) {
        mistakes_.collect([&] { refuse_unknown(member, keys.own); });
      }
    }
    EachKey<SectionReader> each{*this, mistakes_};
    describe(each, section);
  }

  // Each of these throws ConfigError.

  void key(std::string_view name, bool& out) {
    const YamlValue* value = find(name);
    if (!value) return;
    if (value->quoted || (value->text != "true" && value->text != "false")) {
      refuse_type(*value, dotted(name), "true or false");
    }
    out = value->text == "true";
  }

  void key(std::string_view name, std::string& out, Presence presence) {
    const YamlValue* value = find(name);
    if (value) {
      out = text(*value, dotted(name));
    } else if (presence == Presence::required) {
      tree_.fail(dotted(name), "missing; it has no default");
    }
  }

  template <class Enum>
  requires std::is_enum_v<Enum>
  void key(std::string_view name, Enum& out) {
    if (const YamlValue* value = find(name)) {
      out = static_cast<Enum>(index_of(*value, dotted(name), names_of(Enum{})));
    }
  }

  template <class Number>
  void key(std::string_view name, Number& out, const Range& range) {
    if (const YamlValue* value = find(name)) out = number<Number>(*value, dotted(name), range);
  }

  template <class Number>
  void key(std::string_view name, std::optional<Number>& out, const Range& range) {
    if (const YamlValue* value = find(name)) out = number<Number>(*value, dotted(name), range);
  }

  void key(std::string_view name, std::array<double, 2>& out, const Range& range) {
    const YamlValue* value = find(name);
    if (!value) return;
    const std::string path = dotted(name);
    if (value->kind != YamlValue::Kind::list) refuse_type(*value, path, "a list of two numbers");
    if (value->children.size() != out.size()) {
      tree_.fail(value->line, path,
                 fmt::format("got a list of {}, expected two numbers", value->children.size()));
    }
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = number<double>(value->children[i], fmt::format("{}[{}]", path, i), range);
    }
  }

  void key(std::string_view name, std::vector<std::string>& out) {
    const YamlValue* value = find(name);
    if (!value) return;
    const std::string path = dotted(name);
    out.clear();
    for (const YamlValue& item : filled_list(*value, path, "a list of texts")) {
      out.push_back(text(item, fmt::format("{}[{}]", path, out.size())));
    }
  }

  void key(std::string_view name, std::vector<std::string>& out, Names allowed) {
    const YamlValue* value = find(name);
    if (!value) return;
    const std::string path = dotted(name);
    out.clear();
    for (const YamlValue& item : filled_list(*value, path, "a list of names")) {
      const std::string item_path = fmt::format("{}[{}]", path, out.size());
      const std::string_view chosen = allowed[index_of(item, item_path, allowed)];
      if (std::find(out.begin(), out.end(), chosen) != out.end()) {
        tree_.fail(item.line, item_path, fmt::format("{} is listed twice; keep one", shown(item)));
      }
      out.emplace_back(chosen);
    }
  }

  template <class Section>
  void section(std::string_view name, Section& out) {
    const YamlValue* value = find(name);
    // A section whose every key is commented out is null to YAML, and means the defaults.
    if (value && value->kind != YamlValue::Kind::null) read_section(*value, dotted(name), out);
  }

  template <class Section>
  void section(std::string_view name, std::optional<Section>& out) {
    const YamlValue* value = find(name);
    // Here null is refused: it could mean the section with its defaults, or none.
    if (value) read_section(*value, dotted(name), out.emplace());
  }

  template <class Section>
  void list(std::string_view name, std::vector<Section>& out) {
    const YamlValue* value = find(name);
    if (!value || value->kind == YamlValue::Kind::null) return;
    const std::string path = dotted(name);
    if (value->kind != YamlValue::Kind::list) refuse_type(*value, path, "a list of sections");
    for (const YamlValue& item : value->children) {
      const std::string item_path = fmt::format("{}[{}]", path, out.size());
      read_section(item, item_path, out.emplace_back());
    }
  }

 private:
  std::string dotted(std::string_view name) const {
    return path_.empty() ? std::string(name) : fmt::format("{}.{}", path_, name);
  }

  /// nullptr if the key is not given, or taken out by --set.
  const YamlValue* find(std::string_view name) const {
    const YamlValue* value = map_.find(name);
    return value && value->kind != YamlValue::Kind::unset ? value : nullptr;
  }

  [[noreturn]] void refuse_type(const YamlValue& value, const std::string& path,
                                std::string_view expected) const {
    tree_.fail(value.line, path,
               fmt::format("got {}, expected {}{}", shown(value), expected,
                           value.quoted ? " without quotes" : ""));
  }

  [[noreturn]] void refuse_unknown(const YamlValue& member,
                                   const std::vector<std::string>& own) const {
    const std::string path = dotted(member.key);
    const std::string nearest = nearest_key(dotted(""), member.key, own);
    std::string message = "no such key";
    if (nearest == path) {  // "objective.rho: 1" as one key of the file
      message += "; a file nests its sections, only --set takes dotted keys";
    } else if (!nearest.empty()) {
      message += fmt::format("; did you mean {}?", nearest);
    }
    tree_.fail(member.line, path,
               fmt::format("{} ({} has: {})", message, path_.empty() ? "a config" : path_,
                           fmt::join(own, ", ")));
  }

  template <class Section>
  void read_section(const YamlValue& value, const std::string& path, Section& out) {
    if (value.kind != YamlValue::Kind::map) {
      const KeyLister keys = list_keys<Section>("");
      tree_.fail(value.line, path,
                 fmt::format("got {}, expected a section (it has: {})", shown(value),
                             fmt::join(keys.own, ", ")));
    }
    SectionReader(tree_, value, path, mistakes_).read(out);
  }

  const std::vector<YamlValue>& filled_list(const YamlValue& value, const std::string& path,
                                            std::string_view expected) const {
    if (value.kind != YamlValue::Kind::list) refuse_type(value, path, expected);
    if (value.children.empty()) {
      tree_.fail(value.line, path, fmt::format("got an empty list, expected {}", expected));
    }
    return value.children;
  }

  const std::string& text(const YamlValue& value, const std::string& path) const {
    if (value.kind != YamlValue::Kind::scalar) refuse_type(value, path, "a text");
    if (value.text.empty()) tree_.fail(value.line, path, "got an empty text; leave the key out");
    return value.text;
  }

  size_t index_of(const YamlValue& value, const std::string& path, Names allowed) const {
    const auto found = std::find(allowed.begin(), allowed.end(), value.text);
    if (value.kind != YamlValue::Kind::scalar || found == allowed.end()) {
      tree_.fail(value.line, path,
                 fmt::format("got {}, allowed: {}", shown(value), fmt::join(allowed, " | ")));
    }
    return static_cast<size_t>(found - allowed.begin());
  }

  template <class Number>
  Number number(const YamlValue& value, const std::string& path, const Range& range) const {
    const std::string& text = value.text;
    if (!range.word_for_zero.empty() && text == range.word_for_zero) return 0;
    std::string expected = std::is_integral_v<Number> ? "a whole number" : "a number";
    if (!range.word_for_zero.empty()) expected += fmt::format(" or {}", range.word_for_zero);

    Number number{};
    const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (std::is_unsigned_v<Number> && text.starts_with('-')) {
      tree_.fail(value.line, path,
                 fmt::format("got {}, must be {}", printable(text), text_of(range)));
    }
    if (value.kind != YamlValue::Kind::scalar || value.quoted || end != text.data() + text.size() ||
        status == std::errc::invalid_argument) {
      refuse_type(value, path, expected);
    }
    if (status != std::errc() || !std::isfinite(static_cast<double>(number))) {
      tree_.fail(value.line, path,
                 fmt::format("got {}, which is not finite or does not fit in 64 bits", text));
    }
    if (!range.contains(static_cast<double>(number))) {
      tree_.fail(value.line, path, fmt::format("got {}, must be {}", text, text_of(range)));
    }
    return number;
  }

  const YamlTree& tree_;
  const YamlValue& map_;
  std::string path_;
  ConfigMistakes& mistakes_;
};

}  // namespace

void ConfigMistakes::collect(const std::function<void()>& check) {
  try {
    check();
  } catch (const ConfigError& mistake) {
    messages_.emplace_back(mistake.what());
  }
}

void ConfigMistakes::raise(const std::string& file) const {
  if (messages_.size() == 1) throw ConfigError(messages_[0]);
  SAFEGRAD_CHECK(messages_.empty(), ConfigError, "{}: {} mistakes:\n  {}", file, messages_.size(),
                 fmt::join(messages_, "\n  "));
}

RunConfig read_config(const YamlTree& tree, ConfigMistakes& mistakes) {
  RunConfig config;
  SectionReader(tree, tree.root(), "", mistakes).read(config);
  return config;
}

}  // namespace safegrad
