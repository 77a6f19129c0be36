// sample_list.h: task samples as lines of JSON, the worst first: audit.jsonl and gate.jsonl.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/token_file.h"

namespace safegrad {

/// Indices of scores, the lowest first; a score that is no number counts as `no_number`.
std::vector<int64_t> by_score(const std::vector<double>& scores, double no_number);

/// Of a file with sources: of sample i.
std::string source_of(const TokenFile& task, int64_t i);

/// A line a sample, in the order of `order`: index, what `found` has of it (NaN and infinities
/// become null), tokens, scored and, where the file has it, source.
std::string sample_lines(const TokenFile& task, const std::vector<int64_t>& order,
                         const std::function<nlohmann::ordered_json(int64_t)>& found);

}  // namespace safegrad
