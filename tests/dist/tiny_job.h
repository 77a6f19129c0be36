// tiny_job.h: a small training job with random data, for tests that compare layouts.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/metrics.h"
#include "dist/mesh.h"
#include "dist/rank_main.h"
#include "dist/trainer.h"
#include "models/open_model.h"

namespace safegrad::testing {

/// One sequence of a token file; `choice` is 0 (class "left") or 1 ("right").
struct Sample {
  std::vector<int64_t> tokens;
  size_t prompt_length;  ///< tokens that are not scored
  int32_t group = 0, choice = 0;
};

void write_token_file(const std::string& path, const std::vector<Sample>& samples, bool choices);
/// Sequences of 3 to 40 random tokens, a prompt and a response. With `choices`: choice groups of 3
/// candidates in 2 classes.
void write_random_token_file(const std::string& path, int64_t sequences, int64_t vocab_size,
                             uint64_t seed, bool choices);

/// A folder that all ranks of `world` share and that goes away with the object.
class SharedFolder {
 public:
  explicit SharedFolder(dist::Communicator& world);
  ~SharedFolder();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  bool owner_;
};

/// Model `gold` (a folder of tests/gold/data), 11 task and 7 alignment sequences, 5 + 3 a step, 20
/// steps; lr large enough to move.
RunConfig tiny_config(const std::string& gold, const std::string& folder);
/// The same with adapters in place of all weights: attention's and the MLP's, at a rate at which
/// they move.
RunConfig with_lora(RunConfig config);
/// Writes the token files that tiny_config names.
void write_tiny_data(const RunConfig& config);

/// [text.size(), V] of one sequence, adapters included. Collective.
at::Tensor logits_of(dist::Engine& engine, const std::vector<int64_t>& text);

/// A trainer with what it needs to live.
struct TinyJob {
  TinyJob(const RunConfig& config, std::unique_ptr<dist::Communicator> ranks,
          const Backend& device = backend());
  /// Runs steps [first, last).
  std::vector<StepRecord> run(int64_t first, int64_t last);
  /// Every exported tensor, flattened together. Collective.
  std::vector<float> weights();
  /// The same by Hugging Face name.
  std::map<std::string, std::vector<float>> tensors();

  RunConfig config;
  models::OpenedModel model;
  dist::Mesh mesh;
  std::unique_ptr<dist::Trainer> trainer;
};

}  // namespace safegrad::testing
