// probe.h: measures a model by log-likelihood through the same sharded forward pass; nothing is
// generated.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/pack.h"
#include "core/token_file.h"
#include "dist/engine.h"
#include "dist/reference_cache.h"

namespace safegrad::dist {

/// A token file with choice groups: for each prompt the class whose candidates have the largest
/// total probability (log-sum-exp of their sequence log-likelihoods) wins; a tie, or a model that
/// has diverged, is nobody's. Measures, of each class:
/// `<class>`, the share of prompts that it won, and `greedy_<class>`, the share of prompts whose
/// greedy reply begins with one of its candidates (every token of the candidate is the likeliest
/// one), which need not add up to 1. A token file without: measures `loss` (cross-entropy per
/// scored token) and `kl` (KL(p_ref ‖ p) per scored token).
class Probe {
 public:
  /// `reference` is needed by files without choices alone.
  Probe(std::string name, std::shared_ptr<const TokenFile> file,
        std::shared_ptr<const ReferenceCache> reference, int64_t every_steps);

  const std::string& name() const { return name_; }
  int64_t every_steps() const { return every_steps_; }
  const TokenFile& file() const { return *file_; }
  /// Collective. Adapters must be gathered (Engine::begin_step) where the model has them.
  std::map<std::string, double> run(Engine& engine, Mesh& mesh, int64_t max_tokens) const;

 private:
  std::map<std::string, double> run_choices(Engine& engine, Mesh& mesh, int64_t max_tokens) const;
  std::map<std::string, double> run_likelihood(Engine& engine, Mesh& mesh,
                                               int64_t max_tokens) const;
  void judge_groups(const std::vector<int64_t>& groups, Engine& engine,
                    std::vector<double>& counts) const;

  std::string name_;
  std::shared_ptr<const TokenFile> file_;
  std::shared_ptr<const ReferenceCache> reference_;
  int64_t every_steps_;
  std::vector<std::vector<int64_t>> members_;  // sequences of each group
};

}  // namespace safegrad::dist
