// machine_memory.h: the memory that this process may have, and has had.
#pragma once
#include <cstdint>
#include <string>

namespace safegrad {

/// Bytes of the machine's memory, or of the tightest limit above this process in control groups of
/// either version (memory.max, memory.limit_in_bytes): a container has no more. `root` is put
/// before /proc and /sys, for tests; "" otherwise.
int64_t machine_memory(const std::string& root);

/// Most bytes of physical memory that this process has held at a time (VmHWM in
/// /proc/self/status): its own, and what it has touched of shared memory and mapped files. 0 where
/// the system does not say. `root` as above.
int64_t peak_resident_bytes(const std::string& root);

}  // namespace safegrad
