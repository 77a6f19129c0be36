// config_schema.h: the config's keys as a JSON schema, for editors and for docs/config.md.
#pragma once
#include <span>
#include <string>
#include <string_view>

namespace safegrad {

/// What a key means, in one or two sentences of Markdown.
struct KeyMeaning {
  std::string_view key;  ///< dotted, as in docs/config.md; "probe.name" for every entry of the list
  std::string_view text;
};

/// One for every key and section of config_keys.h, in its order.
std::span<const KeyMeaning> key_meanings();

/// JSON Schema (draft 2020-12) of a config file: types, ranges, names, defaults, meanings. What
/// depends on several keys at once is `safegrad check`'s.
std::string config_schema();

}  // namespace safegrad
