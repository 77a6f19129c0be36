// random_tokens.h: token files of random tokens, for benchmarks and plans.
#pragma once
#include <cstdint>
#include <string>

namespace safegrad {

/// What a file of random tokens holds: `sequences` of `length` tokens below `vocab`, the last
/// `scored` (< length) of each scored.
struct RandomTokens {
  int64_t sequences, length, scored, vocab;
  uint64_t seed;
};

/// Throws RunError if the file cannot be written.
void write_random_tokens(const std::string& path, const RandomTokens& tokens);

}  // namespace safegrad
