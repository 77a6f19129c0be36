// run_data.h: the token files of a run.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/causal_lm.h"
#include "core/config.h"
#include "core/token_file.h"

namespace safegrad::dist {

/// The data of a run, opened and checked.
struct RunData {
  std::shared_ptr<const TokenFile> task, align;          ///< align: null with one objective
  std::vector<std::shared_ptr<const TokenFile>> probes;  ///< in the order of config.probe
  /// [rows, D] in place of the start model's hidden states, which are then not computed: a plan's
  /// run has no other ranks to compute theirs. Empty in a job.
  std::function<at::Tensor(int64_t rows)> stand_in;
};

/// Opens every token file of the config and checks it against the model. Collective only through
/// the caller's agree(). Throws NamedFileError.
RunData open_data(const RunConfig& config, const CausalLM& model,
                  const std::string& tokenizer_sha256, std::vector<std::string>& warnings);

}  // namespace safegrad::dist
