// utf8.h: reads text from files as code points; nothing in it is trusted.
#pragma once
#include <cstddef>
#include <optional>
#include <string_view>

namespace safegrad {

/// The code point that begins at text[at], and moves `at` behind it. Nothing, and `at` stays, where
/// the bytes are not UTF-8 (RFC 3629: no surrogate, nothing spelled longer than need be).
std::optional<char32_t> next_code_point(std::string_view text, size_t& at);

/// The place of the first byte that is not part of UTF-8; npos if there is none.
size_t find_not_utf8(std::string_view text);

/// The first code point of UTF-8 `text` that no name has: zero, which ends a path for the system
/// but not for a check, or one that Unicode keeps free and YAML cannot write (U+FFFE, U+FDD0, ...).
std::optional<char32_t> find_unwritable(std::string_view text);

}  // namespace safegrad
