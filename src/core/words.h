// words.h: numbers and sizes in sentences.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include <fmt/format.h>

namespace safegrad {

/// "1 rank", "2 ranks": for nouns that take an s.
inline std::string counted(int64_t number, std::string_view noun) {
  return fmt::format("{} {}{}", number, noun, number == 1 ? "" : "s");
}

/// "1.25 GiB": bytes in the unit that leaves few digits, KiB at least.
inline std::string size_in_words(int64_t bytes) {
  const auto kib = static_cast<double>(bytes) / 1024;
  if (kib >= 1 << 20) return fmt::format("{:.2f} GiB", kib / (1 << 20));
  if (kib >= 1 << 10) return fmt::format("{:.2f} MiB", kib / (1 << 10));
  return fmt::format("{:.2f} KiB", kib);
}

}  // namespace safegrad
