// machine_memory.h: the memory that this process may have.
#pragma once
#include <cstdint>
#include <string>

namespace safegrad {

/// Bytes of the machine's memory, or of the tightest limit above this process in control groups of
/// either version (memory.max, memory.limit_in_bytes): a container has no more. `root` is put
/// before /proc and /sys, for tests; "" otherwise.
int64_t machine_memory(const std::string& root);

}  // namespace safegrad
