// sha256.h: the identity of bytes: of files that are read, and of those that are written.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace safegrad {

/// SHA-256 of bytes that come piece by piece.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  void update(std::span<const std::byte> bytes);
  int64_t bytes() const { return bytes_; }  ///< so far
  std::string hex();                        ///< 64 lower-case hexadecimal digits; ends it

 private:
  struct State;
  std::unique_ptr<State> state_;
  int64_t bytes_ = 0;
};

std::string sha256_of(std::span<const std::byte> bytes);
/// Of the file's bytes. Throws InputError if the file cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace safegrad
