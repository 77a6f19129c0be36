#include "core/yaml_parser.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <utility>

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include "core/error.h"
#include "core/json.h"
#include "core/utf8.h"

namespace safegrad {
namespace {

// More than any config has; keys are compared with each other.
constexpr size_t kMaxChildren = 1000;

YamlValue make_value(YamlValue::Kind kind, int line) {
  YamlValue value;
  value.kind = kind;
  value.line = line;
  return value;
}

/// Turns the parser's events into a tree. yaml-cpp's own Node is not used: it drops duplicate keys
/// and the line of an empty value, and it expands aliases, even ones that contain themselves.
class TreeBuilder : public YAML::EventHandler {
 public:
  /// `key` is empty for a file, else the key of --set whose value is parsed.
  TreeBuilder(const std::string& file, std::string_view key) : file_(file), key_(key) {}

  YamlValue take() { return std::move(result_); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override {
    refuse_as_key(mark, "nothing");
    add(make_value(YamlValue::Kind::null, line_of(mark)));
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    fail(mark, "YAML aliases (*name) are not supported; write the value out");
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                const std::string& text) override {
    refuse_tag(mark, tag);
    if (const auto point = find_unwritable(text)) {
      fail(mark, fmt::format("got a text with U+{:04X} in it, which no name has",
                             static_cast<uint32_t>(*point)));
    }
    if (awaits_key()) {
      begin_member(mark, text);
      return;
    }
    YamlValue value = make_value(YamlValue::Kind::scalar, line_of(mark));
    value.text = text;
    value.quoted = tag == "!";  // yaml-cpp's mark of a quoted or block text
    add(std::move(value));
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    open(mark, tag, YamlValue::Kind::list);
  }
  void OnSequenceEnd() override { close(); }

  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {
    open(mark, tag, YamlValue::Kind::map);
  }
  void OnMapEnd() override { close(); }

 private:
  /// A list or map that is being read. In a map, a member's key arrives before its value.
  struct Level {
    YamlValue value;
    std::string key;
    int key_line = 0;
    bool has_key = false;
  };

  int line_of(const YAML::Mark& mark) const {
    return key_.empty() ? mark.line + 1 : YamlValue::kFromSet;
  }

  bool awaits_key() const {
    return !levels_.empty() && levels_.back().value.kind == YamlValue::Kind::map &&
           !levels_.back().has_key;
  }

  std::string path() const {
    std::string path(key_);
    for (const Level& level : levels_) {
      if (level.value.kind == YamlValue::Kind::list) {
        path += fmt::format("[{}]", level.value.children.size());
      } else if (level.has_key) {
        path += (path.empty() ? "" : ".") + level.key;
      }
    }
    return path;
  }

  [[noreturn]] void fail(const YAML::Mark& mark, std::string_view message) const {
    fail_at(file_, line_of(mark), path(), message);
  }

  void refuse_as_key(const YAML::Mark& mark, std::string_view what) const {
    if (awaits_key())
      fail(mark,
           fmt::format("got {} where a key should be; is a bracket or quote left open?", what));
  }

  void refuse_tag(const YAML::Mark& mark, const std::string& tag) const {
    if (tag.empty() || tag == "?" || tag == "!")
      return;  // what yaml-cpp says where none is written
    fail(mark, fmt::format("YAML tags ({}) are not supported; leave it out", printable(tag)));
  }

  void begin_member(const YAML::Mark& mark, const std::string& key) {
    Level& level = levels_.back();
    level.key = key;
    level.key_line = line_of(mark);
    level.has_key = true;
    const YamlValue* first = level.value.find(key);
    if (!first) return;
    fail(mark, first->line == YamlValue::kFromSet
                   ? std::string("given twice; keep one")
                   : fmt::format("given twice, first on line {}; keep one", first->line));
  }

  void open(const YAML::Mark& mark, const std::string& tag, YamlValue::Kind kind) {
    refuse_tag(mark, tag);
    refuse_as_key(mark, kind == YamlValue::Kind::list ? "a list" : "a section");
    levels_.push_back({.value = make_value(kind, line_of(mark)), .key = {}});
  }

  void close() {
    YamlValue value = std::move(levels_.back().value);
    levels_.pop_back();
    add(std::move(value));
  }

  void add(YamlValue value) {
    if (levels_.empty()) {
      result_ = std::move(value);
      return;
    }
    Level& parent = levels_.back();
    if (parent.value.children.size() == kMaxChildren) {
      fail_at(file_, value.line, path(),
              fmt::format("got more than {} entries side by side", kMaxChildren));
    }
    if (parent.value.kind == YamlValue::Kind::map) {
      value.key = std::exchange(parent.key, {});
      value.line = parent.key_line;
      parent.has_key = false;
    }
    parent.value.children.push_back(std::move(value));
  }

  const std::string& file_;
  std::string_view key_;
  std::vector<Level> levels_;
  YamlValue result_;
};

}  // namespace

const YamlValue* YamlValue::find(std::string_view member) const {
  if (kind != Kind::map) return nullptr;
  for (const YamlValue& child : children) {
    if (child.key == member) return &child;
  }
  return nullptr;
}

std::string shown(const YamlValue& value) {
  switch (value.kind) {
    case YamlValue::Kind::scalar:
      return fmt::format("\"{}\"", printable(value.text));
    case YamlValue::Kind::list:
      return "a list";
    case YamlValue::Kind::map:
      return "a section";
    case YamlValue::Kind::null:
    case YamlValue::Kind::unset:
      break;
  }
  return "nothing";
}

namespace {

// yaml-cpp names what it did not expect, not the indentation that made it so.
std::string hint_of(std::string_view text) {
  int line = 1;
  for (size_t at = 0; at < text.size(); ++line) {
    const size_t first = text.find_first_not_of(' ', at);
    if (first != std::string_view::npos && text[first] == '\t')
      return fmt::format("line {} is indented with a tab, YAML takes spaces alone", line);
    at = text.find('\n', at);
    if (at != std::string_view::npos) ++at;
  }
  return "look at the indentation: the keys of a section begin in the same column";
}

}  // namespace

YamlValue parse_yaml(const std::string& file, std::string_view set_key, std::string_view text) {
  // yaml-cpp 0.7 ends an open quote silently at the end of a file, but only after a newline.
  text = text.substr(0, text.find_last_not_of(" \t\r\n") + 1);
  if (const size_t bad = find_not_utf8(text); bad != std::string_view::npos) {
    // yaml-cpp would put U+FFFD there, and a path would name another file.
    const auto line = 1 + static_cast<int>(std::count(text.begin(), text.begin() + bad, '\n'));
    fail_at(file, set_key.empty() ? line : YamlValue::kFromSet, set_key,
            fmt::format("got the byte {:#04x}, which is not UTF-8; save the file as UTF-8",
                        static_cast<uint8_t>(text[bad])));
  }
  TreeBuilder builder(file, set_key);
  try {
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    if (parser.HandleNextDocument(builder)) {
      YamlValue value = builder.take();
      TreeBuilder second(file, set_key);
      if (parser.HandleNextDocument(second)) {
        fail_at(file, second.take().line, set_key, "a second YAML document begins; keep one");
      }
      return value;
    }
  } catch (const YAML::Exception& error) {
    if (!set_key.empty()) {
      fail_at(file, YamlValue::kFromSet, set_key,
              fmt::format("got \"{}\", which is no YAML value: {}", printable(text),
                          printable(error.msg)));
    }
    throw ConfigError(fmt::format("{}:{}:{}: not valid YAML: {}; {}", file, error.mark.line + 1,
                                  error.mark.column + 1, printable(error.msg), hint_of(text)));
  }
  return {};
}

std::string place_at(const std::string& file, int line, std::string_view key) {
  std::string text = file;
  if (line > 0) text += fmt::format(":{}", line);
  if (line == YamlValue::kFromSet || !key.empty()) text += ": ";
  if (line == YamlValue::kFromSet) text += "--set ";
  return text + printable(key);
}

void fail_at(const std::string& file, int line, std::string_view key, std::string_view message) {
  throw ConfigError(fmt::format("{}: {}", place_at(file, line, key), message));
}

}  // namespace safegrad
