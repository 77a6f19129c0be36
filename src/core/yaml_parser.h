// yaml_parser.h: YAML text as a tree in which every value still knows where it came from.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace safegrad {

/// One value. `line` counts from 1 in the file (a map's member: the line of its key).
struct YamlValue {
  static constexpr int kFromSet = 0;   ///< `line` of a value that came from --set
  static constexpr int kNowhere = -1;  ///< `line` of the root

  enum class Kind {
    null,
    scalar,
    list,
    map,
    unset,  ///< `--set key=null`: as if the key were not there, but its spelling is still checked
  };
  Kind kind = Kind::null;
  int line = kNowhere;
  std::string key;                  ///< of a map's member
  std::string text;                 ///< of a scalar
  bool quoted = false;              ///< of a scalar
  std::vector<YamlValue> children;  ///< of a list or a map, in the order of the file

  const YamlValue* find(std::string_view member) const;  ///< nullptr if absent
};

/// How messages show a value that was refused: its text in quotes, or "nothing", "a list", "a
/// section".
std::string shown(const YamlValue& value);

/// Parses `text`, the content of `file`, or, if `set_key` is not empty, the value that --set gave
/// to that key. No document is null. Refused, since yaml-cpp 0.7 or YAML itself would let them pass
/// silently: duplicate keys, several documents, aliases and tags. Throws ConfigError.
YamlValue parse_yaml(const std::string& file, std::string_view set_key, std::string_view text);

/// "file:12: key", as messages begin; `line` and `key` as below.
std::string place_at(const std::string& file, int line, std::string_view key);

/// Throws ConfigError "file:12: key: message"; line may be kFromSet ("file: --set key: message") or
/// kNowhere ("file: key: message"), and the key empty.
[[noreturn]] void fail_at(const std::string& file, int line, std::string_view key,
                          std::string_view message);

}  // namespace safegrad
