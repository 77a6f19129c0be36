// json.h: JSON from files that are not trusted: bounded depth, no duplicate keys, typed look-ups.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace safegrad {

/// Text from a file made safe for a message: anything but plain ASCII is escaped, the length is
/// capped.
std::string printable(std::string_view text, size_t max_length = 120);

/// Parses `text`; `where` begins each message. Throws InputError for bad JSON, more than 64 nested
/// levels, or an object that has a key twice (nlohmann-json itself would keep the last one).
nlohmann::json parse_json(std::string_view text, const std::string& where);

/// `value` as a list of strings, else InputError.
std::vector<std::string> string_list(const nlohmann::json& value, const std::string& where);

/// Typed look-ups in one JSON object. A key that is null counts as absent; an absent key gives
/// `fallback`, or InputError without one. Each InputError has file, key, what was got and what is
/// allowed. Refers to the object it was made from.
class JsonObject {
 public:
  /// Throws InputError unless `value` is an object.
  JsonObject(const nlohmann::json& value, std::string where);

  const nlohmann::json* find(const std::string& key) const;  ///< nullptr if absent
  int64_t integer(const std::string& key, int64_t min, int64_t max,
                  std::optional<int64_t> fallback = {}) const;
  /// Finite and > 0.
  double positive(const std::string& key, std::optional<double> fallback = {}) const;
  bool boolean(const std::string& key, bool fallback) const;
  std::string string(const std::string& key, std::optional<std::string> fallback = {}) const;
  /// Throws the InputError of `key`.
  [[noreturn]] void refuse(const std::string& key, const std::string& allowed) const;

 private:
  const nlohmann::json& value_;
  std::string where_;
};

}  // namespace safegrad
