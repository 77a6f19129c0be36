#include "core/json.h"

#include <cmath>
#include <limits>
#include <unordered_set>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/error.h"

namespace safegrad {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 64;

/// The value as it stands in the file, short enough for a message.
std::string shown(const json* value) {
  if (value == nullptr) return "nothing";
  // Only scalars are dumped: a container may be as large as the file.
  if (value->is_structured()) {
    return fmt::format("a JSON {} of {}", value->type_name(), value->size());
  }
  return printable(value->dump());
}

}  // namespace

std::string printable(std::string_view text, size_t max_length) {
  std::string out;
  for (const char c : text) {
    if (out.size() >= max_length) return out + "...";
    if (c == '\\') {
      out += "\\\\";
    } else if (c >= 0x20 && c < 0x7f) {
      out += c;
    } else {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  return out;
}

json parse_json(std::string_view text, const std::string& where) {
  std::vector<std::unordered_set<std::string>> open;  // keys seen so far, per open container
  const auto check = [&](int, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        SAFEGRAD_CHECK(open.size() < kMaxDepth, InputError, "{}: JSON nested deeper than {} levels",
                       where, kMaxDepth);
        open.emplace_back();
        break;
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
        open.pop_back();
        break;
      case json::parse_event_t::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        SAFEGRAD_CHECK(open.back().insert(key).second, InputError,
                       "{}: the key \"{}\" appears twice in one JSON object", where,
                       printable(key));
        break;
      }
      case json::parse_event_t::value:
        break;
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::exception& error) {
    throw InputError(fmt::format("{}: not valid JSON: {}", where, printable(error.what(), 240)));
  }
}

std::vector<std::string> string_list(const json& value, const std::string& where) {
  SAFEGRAD_CHECK(value.is_array(), InputError, "{}: got {}, a list of strings is expected", where,
                 shown(&value));
  std::vector<std::string> out;
  for (const json& item : value) {
    SAFEGRAD_CHECK(item.is_string(), InputError, "{}: entry {} is {}, a string is expected", where,
                   out.size(), shown(&item));
    out.push_back(item.get<std::string>());
  }
  return out;
}

JsonObject::JsonObject(const json& value, std::string where)
    : value_(value), where_(std::move(where)) {
  SAFEGRAD_CHECK(value.is_object(), InputError, "{}: got {}, a JSON object is expected", where_,
                 shown(&value));
}

const json* JsonObject::find(const std::string& key) const {
  const auto it = value_.find(key);
  return it == value_.end() || it->is_null() ? nullptr : &*it;
}

void JsonObject::refuse(const std::string& key, const std::string& allowed) const {
  throw InputError(fmt::format("{}: {}: got {}; allowed: {}", where_, printable(key),
                               shown(find(key)), allowed));
}

int64_t JsonObject::integer(const std::string& key, int64_t min, int64_t max,
                            std::optional<int64_t> fallback) const {
  const json* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  const std::string allowed = fmt::format("a whole number from {} to {}", min, max);
  if (value == nullptr || !value->is_number_integer()) refuse(key, allowed);
  constexpr auto kLargest = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (value->is_number_unsigned() && value->get<uint64_t>() > kLargest) refuse(key, allowed);
  const auto number = value->get<int64_t>();
  if (number < min || number > max) refuse(key, allowed);
  return number;
}

double JsonObject::positive(const std::string& key, std::optional<double> fallback) const {
  const json* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  const std::string allowed = "a finite number above 0";
  if (value == nullptr || !value->is_number()) refuse(key, allowed);
  const auto number = value->get<double>();
  if (!(number > 0) || !std::isfinite(number)) refuse(key, allowed);
  return number;
}

bool JsonObject::boolean(const std::string& key, bool fallback) const {
  const json* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) refuse(key, "true or false");
  return value->get<bool>();
}

std::string JsonObject::string(const std::string& key, std::optional<std::string> fallback) const {
  const json* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  if (value == nullptr || !value->is_string()) refuse(key, "a string");
  return value->get<std::string>();
}

}  // namespace safegrad
