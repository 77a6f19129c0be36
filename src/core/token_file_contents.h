// token_file_contents.h: what a TokenFile holds; only its two sources include this.
#pragma once
#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/safetensors.h"
#include "core/token_file.h"

namespace safegrad {

/// The way out of most damage, as the end of a message.
inline constexpr std::string_view kPrepareAgain =
    "prepare it again with tools/prepare.py --model FOLDER";

/// A one-dimensional tensor of the mapping, or a copy of it where the file did not align it.
template <class T>
class Column {
 public:
  Column() = default;
  Column(const Column&) = delete;
  Column& operator=(const Column&) = delete;

  void set(const TensorView& tensor) {
    const auto n = static_cast<size_t>(tensor.numel());
    if (n == 0 || reinterpret_cast<uintptr_t>(tensor.bytes.data()) % alignof(T) == 0) {
      values_ = {reinterpret_cast<const T*>(tensor.bytes.data()), n};
      return;
    }
    copy_.resize(n);
    std::memcpy(copy_.data(), tensor.bytes.data(), tensor.bytes.size());
    values_ = copy_;
  }
  std::span<const T> operator()() const { return values_; }

 private:
  std::vector<T> copy_;
  std::span<const T> values_;
};

struct TokenFile::Contents {
  explicit Contents(const std::string& path) : file(path) {}

  void check_format() const;
  void map_columns();
  void check_offsets() const;
  void check_sequences(const TokenFileExpectation& expected);
  void check_tokens(int64_t i, const TokenFileExpectation& expected) const;
  int64_t checked_scored(int64_t i) const;
  void check_sources();
  void check_choices();
  void check_group_member(int64_t first, int64_t i) const;
  void check_tokenizer(const std::string& expected, std::vector<std::string>& warnings) const;

  std::string metadata(const std::string& key) const;
  std::vector<std::string> names(const std::string& key) const;
  void check_index(const char* column, int64_t i, int32_t value,
                   const std::vector<std::string>& names) const;
  const TensorView& column(const std::string& name, Dtype dtype, int64_t length) const;

  int64_t size() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t total() const { return static_cast<int64_t>(tokens().size()); }
  int64_t length(int64_t i) const { return offsets[i + 1] - offsets[i]; }
  std::span<const int32_t> tokens_of(int64_t i) const {
    return tokens().subspan(offsets[i], length(i));
  }
  std::span<const uint8_t> mask_of(int64_t i) const {
    return mask().subspan(offsets[i], length(i));
  }
  int64_t first_scored(int64_t i) const {
    const auto m = mask_of(i);
    return std::find(m.begin(), m.end(), 1) - m.begin();
  }

  SafetensorsFile file;
  Column<int32_t> tokens, source, group, choice;
  Column<uint8_t> mask;
  std::vector<int64_t> offsets;
  std::vector<int64_t> scored;  // per sequence
  int64_t total_scored = 0;
  std::vector<std::string> sources, classes;
  uint64_t fingerprint = 0;
};

}  // namespace safegrad
