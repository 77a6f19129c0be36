// fuzz_token_file.cpp: any bytes as a token file: of what is taken, every promise of token_file.h
// holds.
#include <iterator>
#include <string>
#include <vector>

#include "core/token_file.h"
#include "fuzz/fuzz_input.h"

namespace safegrad::fuzz {
namespace {

constexpr int64_t kVocabulary = 1000, kLongest = 64;

void check_sequence(const TokenFile& file, int64_t i) {
  const auto tokens = file.tokens(i);
  const auto mask = file.mask(i);
  require(std::ssize(tokens) == file.length(i) && std::ssize(mask) == file.length(i),
          "a sequence has its length");
  require(file.length(i) >= 1 && file.length(i) <= kLongest, "a sequence is not too long");
  for (const int32_t id : tokens) require(id >= 0 && id < kVocabulary, "a token is a known one");
  int64_t scored = 0;
  for (const uint8_t m : mask) scored += m;
  require(mask[0] == 0 && scored == file.scored(i) && scored >= 1, "a sequence is scored");
  if (file.has_sources()) file.sources().at(static_cast<size_t>(file.source(i)));
  if (file.has_choices()) {
    file.classes().at(static_cast<size_t>(file.choice(i)));
    require(file.group(i) >= 0 && file.group(i) < file.groups(), "a choice is in a group");
  }
}

void check(const TokenFile& file) {
  int64_t tokens = 0, scored = 0;
  for (int64_t i = 0; i < file.size(); ++i) {
    check_sequence(file, i);
    tokens += file.length(i);
    scored += file.scored(i);
  }
  require(file.size() >= 1 && tokens == file.total_tokens() && scored == file.total_scored(),
          "the sequences are the whole file");
}

}  // namespace
}  // namespace safegrad::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace safegrad;
  const fuzz::MemoryFile input(fuzz::as_safetensors(fuzz::as_text(data, size)));
  const std::string tokenizer(64, 'a');
  std::vector<std::string> warnings;
  fuzz::takes([&] {
    fuzz::check(TokenFile(input.path(),
                          {.tokenizer_sha256 = tokenizer,
                           .vocab_size = fuzz::kVocabulary,
                           .max_length = fuzz::kLongest},
                          warnings));
  });
  // What `safegrad` does before the model is known.
  fuzz::takes([&] { TokenFile(input.path(), {}, warnings); });
  return 0;
}
