// token_file.h: a data set as tokens, mapped from disk and checked completely before training.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace safegrad {

/// What a token file has to agree with.
/// Empty or 0: unknown, the check only warns.
struct TokenFileExpectation {
  std::string tokenizer_sha256 = "";  ///< of the model's tokenizer.json
  int64_t vocab_size = 0;             ///< token ids must be in [0, vocab_size)
  int64_t max_length = 0;             ///< longest sequence the model can take
};

/// A safetensors file with
///   tokens i32[T], loss_mask u8[T] (0 or 1), offsets i64[M+1] (0 = first, T = last, strictly
///   ascending), M >= 1
///   optional source i32[M]: index into metadata "sources" (a JSON list of names)
///   optional group i32[M] and choice i32[M]: choice groups of a probe; choice indexes metadata
///   "classes"
/// metadata: format = "safegrad.tokens/1", tokenizer_sha256, template_sha256, sources, classes.
/// Position t of a sequence is scored when loss_mask[t+1] = 1, so the mask of a first token must be
/// 0 and every sequence has at least one scored position. Choice groups: the sequences of one group
/// are adjacent (group ids ascend from 0 without gaps), share the same tokens before their first
/// scored one, and hold at least two classes.
class TokenFile {
 public:
  /// Maps and checks everything above. Throws DataError naming the file, the sequence, both values
  /// and what to do. `warnings` receives sentences about what could not be checked.
  TokenFile(const std::string& path, const TokenFileExpectation& expected,
            std::vector<std::string>& warnings);
  ~TokenFile();
  TokenFile(TokenFile&&) noexcept;
  TokenFile& operator=(TokenFile&&) noexcept;

  const std::string& path() const;
  int64_t size() const;             ///< M sequences
  int64_t total_tokens() const;     ///< T
  int64_t total_scored() const;     ///< sum of the mask
  int64_t length(int64_t i) const;  ///< tokens of sequence i
  int64_t scored(int64_t i) const;  ///< scored positions of sequence i
  std::span<const int32_t> tokens(int64_t i) const;
  std::span<const uint8_t> mask(int64_t i) const;

  bool has_sources() const;
  const std::vector<std::string>& sources() const;  ///< names; empty if the file has none
  int32_t source(int64_t i) const;                  ///< only if has_sources()
  bool has_choices() const;
  const std::vector<std::string>& classes() const;  ///< names; empty without choice groups
  int32_t group(int64_t i) const;                   ///< only if has_choices(), as choice()
  int32_t choice(int64_t i) const;
  int64_t groups() const;  ///< 0 without choice groups

  /// 64-bit content hash of tokens, mask and offsets: keys the reference cache and the resume
  /// check.
  uint64_t fingerprint() const;

 private:
  struct Contents;
  std::unique_ptr<Contents> contents_;
};

}  // namespace safegrad
