// fuzz_input.h: a fuzzer's bytes as a file, and what counts as a right answer to a hostile file.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include <sys/mman.h>
#include <unistd.h>

#include "core/error.h"

namespace safegrad::fuzz {

/// Ends the process, which libFuzzer reports as a finding along with the input, unless `condition`.
inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "not as it must be: %s\n", what);
  std::abort();
}

/// Whether `body` takes its input. Only InputError is a refusal: whatever else is thrown, a
/// UsageError (a bug of ours) too, escapes and is a finding.
template <class Body>
bool takes(Body&& body) {
  try {
    body();
  } catch (const InputError& error) {
    require(*error.what() != '\0', "a refusal has a message");
    return false;
  }
  return true;
}

/// A regular file in memory that lasts as long as the object: a disk would take most of the time.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view bytes = {})
      : descriptor_(::memfd_create("input", MFD_CLOEXEC)) {
    require(descriptor_ >= 0, "a file in memory can be made");
    path_ = fmt::format("/proc/self/fd/{}", descriptor_);
    assign(bytes);
  }
  ~MemoryFile() { ::close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  void assign(std::string_view bytes) {
    require(::ftruncate(descriptor_, 0) == 0, "a file in memory can be emptied");
    const ssize_t written = ::pwrite(descriptor_, bytes.data(), bytes.size(), 0);
    require(written == static_cast<ssize_t>(bytes.size()), "a file in memory takes its bytes");
  }
  const std::string& path() const { return path_; }

 private:
  int descriptor_;
  std::string path_;
};

inline std::string_view as_text(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

/// Takes the text before the next zero byte off `rest`, and that byte.
inline std::string_view take_part(std::string_view& rest) {
  const size_t end = rest.find('\0');
  const std::string_view part = rest.substr(0, end);
  rest = end == std::string_view::npos ? std::string_view{} : rest.substr(end + 1);
  return part;
}

/// The bytes of a safetensors file. An input that begins with '{' is a header and, after a zero
/// byte, its data: the length in front is made here, or hardly any change to a header would get
/// past it.
inline std::string as_safetensors(std::string_view input) {
  if (!input.starts_with('{')) return std::string(input);
  const std::string_view header = take_part(input);
  const uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file.append(header).append(input);
}

}  // namespace safegrad::fuzz
