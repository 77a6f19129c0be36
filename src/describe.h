// describe.h: a job in words.
#pragma once
#include <map>
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

/// " (0.06 epochs) of 8 + 4 sequences, rule safegrad, rho 1, lr 0.0002": what follows the number of
/// steps, with the settings of the objective that the rule uses.
std::string steps_in_words(const RunConfig& config, int64_t steps, int64_t task_sequences);

/// "memory a rank: 1.4 GiB planned (...)" of a job of `ranks`, `near` of them on this machine; or
/// why it cannot be planned, which is no reason to end a run.
std::string planned_memory_in_words(const Job& job, bool gpu, int64_t ranks, int64_t near);

/// The first lines of a run: model, ranks, data, steps, memory.
std::string header_in_words(const Job& job, int64_t ranks, int64_t shards, int64_t near);

/// A line of what is read or computed before the first step.
std::string reading_in_words(const Job& job);

/// What a probe has found. Of choices first what decoding would say, the share of prompts whose
/// greedy reply begins with a class; then the share for which the class is the likeliest:
/// " greedy reply no 20.0 %, yes 40.0 %; likeliest no 60.0 %, yes 40.0 %", " kl 0.0012 loss 3.412".
std::string measures_in_words(const std::map<std::string, double>& measures);

/// What `check` has found: what would run, on `ranks` and where it would be written.
std::string check_in_words(const Job& job, int64_t ranks, int64_t near);

}  // namespace safegrad
