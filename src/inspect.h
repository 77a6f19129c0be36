// inspect.h: says what a file or a folder is.
#pragma once
#include <string>

namespace safegrad {

/// A few lines about a token file, a safetensors file, a model or adapter folder, a checkpoint, or
/// a run folder. Reads headers, the manifest and metrics; a token file is checked completely.
/// Throws InputError where `path` is none of these, or is damaged.
std::string inspect(const std::string& path);

}  // namespace safegrad
