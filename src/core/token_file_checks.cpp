// The checks of token_file.h: everything that training would otherwise trip over later.
#include <algorithm>
#include <limits>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "core/token_file_contents.h"

namespace safegrad {

void TokenFile::Contents::check_format() const {
  constexpr std::string_view kFormat = "safegrad.tokens/1";
  const std::string format = metadata("format");
  SAFEGRAD_CHECK(format == kFormat, DataError,
                 "{}: metadata \"format\" is \"{}\", \"{}\" is expected; make a token file with "
                 "tools/prepare.py --model FOLDER",
                 file.path(), printable(format), kFormat);
  const std::set<std::string> known = {"tokens", "loss_mask", "offsets",
                                       "source", "group",     "choice"};
  for (const auto& [name, tensor] : file.tensors()) {
    SAFEGRAD_CHECK(known.contains(name), DataError,
                   "{}: unknown tensor \"{}\"; allowed: {}; was it made by another version?",
                   file.path(), printable(name), fmt::join(known, ", "));
  }
}

void TokenFile::Contents::check_offsets() const {
  SAFEGRAD_CHECK(offsets.front() == 0 && offsets.back() == total(), DataError,
                 "{}: offsets run from {} to {}, from 0 to {} (the tokens) is expected; {}",
                 file.path(), offsets.front(), offsets.back(), total(), kPrepareAgain);
  for (int64_t i = 0; i < size(); ++i) {
    SAFEGRAD_CHECK(offsets[i] < offsets[i + 1], DataError,
                   "{}: sequence {} runs from offset {} to {}, offsets must ascend; {}",
                   file.path(), i, offsets[i], offsets[i + 1], kPrepareAgain);
  }
}

void TokenFile::Contents::check_tokens(int64_t i, const TokenFileExpectation& expected) const {
  const int64_t longest = expected.max_length;
  SAFEGRAD_CHECK(longest == 0 || length(i) <= longest, DataError,
                 "{}: sequence {} has {} tokens, the model takes at most {}; prepare it again with "
                 "a shorter maximum length",
                 file.path(), i, length(i), longest);

  constexpr int64_t kIdEnd = int64_t{std::numeric_limits<int32_t>::max()} + 1;
  const int64_t id_end = expected.vocab_size == 0 ? kIdEnd : std::min(expected.vocab_size, kIdEnd);
  // As unsigned a negative id is too large as well, so one branch-free pass finds both.
  const auto outside = [limit = static_cast<uint32_t>(id_end)](int32_t id) {
    return static_cast<uint32_t>(id) >= limit;
  };
  const auto ids = tokens_of(i);
  bool any = false;
  for (const int32_t id : ids) any |= outside(id);
  if (!any) return;
  const auto bad = std::find_if(ids.begin(), ids.end(), outside);
  throw DataError(
      fmt::format("{}: sequence {}: token {} at position {} is outside the vocabulary [0, {}); the "
                  "file was made for another model, {}",
                  file.path(), i, *bad, bad - ids.begin(), id_end, kPrepareAgain));
}

/// The number of scored positions of sequence i, after checking its mask.
int64_t TokenFile::Contents::checked_scored(int64_t i) const {
  const auto m = mask_of(i);
  int64_t sum = 0;
  uint8_t all = 0;
  for (const uint8_t value : m) {
    sum += value;
    all |= value;
  }
  if (all > 1) {
    const auto bad = std::find_if(m.begin(), m.end(), [](uint8_t v) { return v > 1; });
    throw DataError(
        fmt::format("{}: sequence {}: loss_mask is {} at position {}, 0 or 1 is "
                    "expected; {}",
                    file.path(), i, *bad, bad - m.begin(), kPrepareAgain));
  }
  SAFEGRAD_CHECK(m[0] == 0, DataError,
                 "{}: sequence {}: loss_mask of the first token is 1, it must be 0: nothing "
                 "predicts that token; {}",
                 file.path(), i, kPrepareAgain);
  SAFEGRAD_CHECK(sum > 0, DataError,
                 "{}: sequence {} has {} tokens and none is scored, at least one is expected; was "
                 "its response cut off? {}",
                 file.path(), i, length(i), kPrepareAgain);
  return sum;
}

void TokenFile::Contents::check_sequences(const TokenFileExpectation& expected) {
  scored.reserve(static_cast<size_t>(size()));
  for (int64_t i = 0; i < size(); ++i) {
    check_tokens(i, expected);
    scored.push_back(checked_scored(i));
    total_scored += scored.back();
  }
}

void TokenFile::Contents::check_index(const char* name, int64_t i, int32_t value,
                                      const std::vector<std::string>& names) const {
  SAFEGRAD_CHECK(value >= 0 && static_cast<size_t>(value) < names.size(), DataError,
                 "{}: sequence {}: {} is {}, there are {} names; {}", file.path(), i, name, value,
                 names.size(), kPrepareAgain);
}

void TokenFile::Contents::check_sources() {
  sources = names("sources");
  SAFEGRAD_CHECK(file.contains("source") == !sources.empty(), DataError,
                 "{}: tensor \"source\" is {}, metadata \"sources\" has {} names; a file has both "
                 "or none; {}",
                 file.path(), file.contains("source") ? "there" : "missing", sources.size(),
                 kPrepareAgain);
  if (sources.empty()) return;
  source.set(column("source", Dtype::i32, size()));
  for (int64_t i = 0; i < size(); ++i) check_index("source", i, source()[i], sources);
}

/// Sequence i belongs to the choice group that begins at `first`: same question, scored answer.
void TokenFile::Contents::check_group_member(int64_t first, int64_t i) const {
  const int64_t prefix = first_scored(first);
  SAFEGRAD_CHECK(first_scored(i) == prefix, DataError,
                 "{}: choice group {}: sequence {} is scored from token {}, sequence {} from {}; "
                 "they must share what comes before; {}",
                 file.path(), group()[i], i, first_scored(i), first, prefix, kPrepareAgain);
  SAFEGRAD_CHECK(
      checked_scored(i) == length(i) - prefix, DataError,
      "{}: choice group {}: sequence {} scores {} of the {} tokens from its first scored one on; a "
      "candidate is scored to its end; {}",
      file.path(), group()[i], i, checked_scored(i), length(i) - prefix, kPrepareAgain);
  const auto x = tokens_of(first).first(prefix), y = tokens_of(i).first(prefix);
  const auto [px, py] = std::mismatch(x.begin(), x.end(), y.begin());
  SAFEGRAD_CHECK(px == x.end(), DataError,
                 "{}: choice group {}: sequences {} and {} have tokens {} and {} at position {}; "
                 "they must share what comes before the first scored one; {}",
                 file.path(), group()[i], first, i, *px, *py, px - x.begin(), kPrepareAgain);
}

void TokenFile::Contents::check_choices() {
  classes = names("classes");
  const bool any = file.contains("group") || file.contains("choice") || !classes.empty();
  const bool all = file.contains("group") && file.contains("choice") && !classes.empty();
  SAFEGRAD_CHECK(any == all, DataError,
                 "{}: tensor \"group\" is {}, \"choice\" is {}, metadata \"classes\" has {} names; "
                 "a file has all or none; {}",
                 file.path(), file.contains("group") ? "there" : "missing",
                 file.contains("choice") ? "there" : "missing", classes.size(), kPrepareAgain);
  if (!any) return;
  group.set(column("group", Dtype::i32, size()));
  choice.set(column("choice", Dtype::i32, size()));

  int64_t first = 0;
  bool two_classes = true;
  const auto check_classes = [&] {
    SAFEGRAD_CHECK(two_classes, DataError,
                   "{}: choice group {} holds only class \"{}\", at least two are expected; {}",
                   file.path(), group()[first], printable(classes[choice()[first]]), kPrepareAgain);
  };
  for (int64_t i = 0; i < size(); ++i) {
    check_index("choice", i, choice()[i], classes);
    const int32_t previous = i == 0 ? -1 : group()[i - 1];
    const bool begins = i == 0 || group()[i] != previous;
    SAFEGRAD_CHECK(!begins || group()[i] == int64_t{previous} + 1, DataError,
                   "{}: sequence {}: group is {} after {}; groups must ascend from 0 without gaps; "
                   "{}",
                   file.path(), i, group()[i], previous, kPrepareAgain);
    if (begins) {
      check_classes();
      first = i;
      two_classes = false;
    } else {
      check_group_member(first, i);
      two_classes |= choice()[i] != choice()[first];
    }
  }
  check_classes();
}

void TokenFile::Contents::check_tokenizer(const std::string& expected,
                                          std::vector<std::string>& warnings) const {
  const std::string own = metadata("tokenizer_sha256");
  if (own.empty() || expected.empty()) {
    warnings.push_back(
        fmt::format("{}: {} names no tokenizer, so nothing checks that the tokens fit the model.",
                    file.path(), own.empty() ? "the file" : "the model"));
    return;
  }
  SAFEGRAD_CHECK(own == expected, DataError, "{}: made with tokenizer {}, the model has {}; {}",
                 file.path(), printable(own.substr(0, 12)), printable(expected.substr(0, 12)),
                 kPrepareAgain);
}

}  // namespace safegrad
