#include "core/utf8.h"

namespace safegrad {

std::optional<char32_t> next_code_point(std::string_view text, size_t& at) {
  const auto first = static_cast<unsigned char>(text[at]);
  if (first < 0x80) {
    ++at;
    return first;
  }
  const size_t length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  if (first < 0xc2 || first > 0xf4 || text.size() - at < length) return {};
  char32_t point = first & (0x7fu >> length);
  for (const char c : text.substr(at + 1, length - 1)) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte & 0xc0) != 0x80) return {};
    point = point << 6 | (byte & 0x3f);
  }
  const char32_t shortest = length == 2 ? 0x80 : length == 3 ? 0x800 : 0x10000;
  if (point < shortest || point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff)) return {};
  at += length;
  return point;
}

size_t find_not_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    if (!next_code_point(text, at)) return at;
  }
  return std::string_view::npos;
}

std::optional<char32_t> find_unwritable(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const auto point = next_code_point(text, at);
    if (!point) return {};
    const bool free = (*point & 0xfffe) == 0xfffe || (*point >= 0xfdd0 && *point <= 0xfdef);
    if (*point == 0 || free) return point;
  }
  return {};
}

}  // namespace safegrad
