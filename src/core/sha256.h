// sha256.h: the identity of a file, for tokenizers and templates.
#pragma once
#include <string>

namespace safegrad {

/// SHA-256 of the file's bytes as 64 lower-case hexadecimal digits. Throws InputError if the file
/// cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace safegrad
