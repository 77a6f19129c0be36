#include "core/token_file.h"

#include <cstring>
#include <set>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/random.h"
#include "core/token_file_contents.h"

namespace safegrad {
namespace {

uint64_t mix_bytes(uint64_t hash, std::span<const std::byte> bytes) {
  hash = mix64(hash, bytes.size());
  size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes.data() + i, 8);
    hash = mix64(hash, word);
  }
  uint64_t rest = 0;
  if (i < bytes.size()) std::memcpy(&rest, bytes.data() + i, bytes.size() - i);
  return mix64(hash, rest);
}

}  // namespace

std::string TokenFile::Contents::metadata(const std::string& key) const {
  const auto it = file.metadata().find(key);
  return it == file.metadata().end() ? "" : it->second;
}

/// The metadata's JSON list of distinct names; empty if there is none.
std::vector<std::string> TokenFile::Contents::names(const std::string& key) const {
  const std::string text = metadata(key);
  if (text.empty()) return {};
  const std::string where = fmt::format("{}: metadata \"{}\"", file.path(), key);
  auto list = string_list(parse_json(text, where), where);
  SAFEGRAD_CHECK(std::set<std::string>(list.begin(), list.end()).size() == list.size(), DataError,
                 "{}: has a name twice; {}", where, kPrepareAgain);
  return list;
}

const TensorView& TokenFile::Contents::column(const std::string& name, Dtype dtype,
                                              int64_t length) const {
  const TensorView& tensor = file.at(name);
  SAFEGRAD_CHECK(tensor.dtype == dtype && tensor.shape.size() == 1, DataError,
                 "{}: {} is {} of shape [{}], one dimension of {} is expected; {}", file.path(),
                 name, name_of(tensor.dtype), fmt::join(tensor.shape, ", "), name_of(dtype),
                 kPrepareAgain);
  SAFEGRAD_CHECK(length < 0 || tensor.shape[0] == length, DataError,
                 "{}: {} has {} entries, {} are expected; {}", file.path(), name, tensor.shape[0],
                 length, kPrepareAgain);
  return tensor;
}

void TokenFile::Contents::map_columns() {
  const TensorView& bounds = column("offsets", Dtype::i64, -1);
  SAFEGRAD_CHECK(bounds.numel() >= 2, DataError,
                 "{}: the file is empty (offsets has {} entries, 2 or more are expected); prepare "
                 "it from at least one sample",
                 file.path(), bounds.numel());
  offsets.resize(static_cast<size_t>(bounds.numel()));
  std::memcpy(offsets.data(), bounds.bytes.data(), bounds.bytes.size());
  tokens.set(column("tokens", Dtype::i32, -1));
  mask.set(column("loss_mask", Dtype::u8, total()));
}

TokenFile::TokenFile(const std::string& path, const TokenFileExpectation& expected,
                     std::vector<std::string>& warnings) {
  SAFEGRAD_CHECK(expected.vocab_size >= 0 && expected.max_length >= 0, UsageError,
                 "{}: checked against a vocabulary of {} and a maximum length of {}", path,
                 expected.vocab_size, expected.max_length);
  contents_ = rethrow_as<DataError>([&] {
    auto c = std::make_unique<Contents>(path);
    c->check_format();
    c->check_tokenizer(expected.tokenizer_sha256, warnings);
    c->map_columns();
    c->check_offsets();
    c->check_sequences(expected);
    c->check_sources();
    c->check_choices();
    uint64_t hash = mix_bytes(0, std::as_bytes(c->tokens()));
    hash = mix_bytes(hash, std::as_bytes(c->mask()));
    c->fingerprint = mix_bytes(hash, std::as_bytes(std::span(c->offsets)));
    return c;
  });
  if (expected.vocab_size == 0) {
    warnings.push_back(path + ": the vocabulary is not known, so token ids are not checked.");
  }
  if (expected.max_length == 0) {
    warnings.push_back(path + ": the model's maximum length is not known, so it is not checked.");
  }
}

TokenFile::~TokenFile() = default;
TokenFile::TokenFile(TokenFile&&) noexcept = default;
TokenFile& TokenFile::operator=(TokenFile&&) noexcept = default;

const std::string& TokenFile::path() const {
  return contents_->file.path();
}
int64_t TokenFile::size() const {
  return contents_->size();
}
int64_t TokenFile::total_tokens() const {
  return contents_->total();
}
int64_t TokenFile::total_scored() const {
  return contents_->total_scored;
}
int64_t TokenFile::length(int64_t i) const {
  return contents_->length(i);
}
int64_t TokenFile::scored(int64_t i) const {
  return contents_->scored[i];
}
std::span<const int32_t> TokenFile::tokens(int64_t i) const {
  return contents_->tokens_of(i);
}
std::span<const uint8_t> TokenFile::mask(int64_t i) const {
  return contents_->mask_of(i);
}

bool TokenFile::has_sources() const {
  return !contents_->sources.empty();
}
const std::vector<std::string>& TokenFile::sources() const {
  return contents_->sources;
}
int32_t TokenFile::source(int64_t i) const {
  return contents_->source()[i];
}
bool TokenFile::has_choices() const {
  return !contents_->classes.empty();
}
const std::vector<std::string>& TokenFile::classes() const {
  return contents_->classes;
}
int32_t TokenFile::group(int64_t i) const {
  return contents_->group()[i];
}
int32_t TokenFile::choice(int64_t i) const {
  return contents_->choice()[i];
}
int64_t TokenFile::groups() const {
  return has_choices() ? int64_t{contents_->group().back()} + 1 : 0;
}
uint64_t TokenFile::fingerprint() const {
  return contents_->fingerprint;
}

}  // namespace safegrad
