// describe.h: a job in words, before it runs.
#pragma once
#include <string>

#include "job.h"

namespace safegrad {

/// "SmolLM2-135M-Instruct, LoRA r8 (0.46 M of 135 M trained)".
std::string model_in_words(const Job& job);

/// "data parallel", "fully sharded", "2 replicas x 4 shards".
std::string layout_in_words(int64_t ranks, int64_t shards);

/// "2 ranks, mpi, cpu, fully sharded"; one rank has no layout. `device`: the backend's name.
std::string ranks_in_words(int64_t ranks, int64_t shards, bool gpu, const std::string& device);

/// A line for each data set: sequences, tokens, how many are scored, and the share of each source
/// where there are several.
std::string data_in_words(const dist::RunData& data);

/// "memory a rank: 1.4 GiB planned (...)" of a job of `ranks`, `near` of them on this machine; or
/// why it cannot be planned, which is no reason to end a run.
std::string planned_memory_in_words(const Job& job, bool gpu, int64_t ranks, int64_t near);

/// What `check` has found: what would run, on `ranks` and where it would be written.
std::string check_in_words(const Job& job, int64_t ranks, int64_t near);

}  // namespace safegrad
