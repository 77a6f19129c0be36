// gold.h: the numbers of tests/gold/data, and engines set up to be compared with them.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/pack.h"
#include "core/safetensors.h"
#include "core/token_file.h"
#include "core/weight_source.h"
#include "dist/engine.h"
#include "models/open_model.h"

namespace safegrad::testing {

/// A tensor of a safetensors file as f64.
at::Tensor read_tensor(const TensorView& view);

/// One folder of tests/gold/data: the model, its packed sequences as two token files, and the
/// expected numbers.
class Gold {
 public:
  explicit Gold(const std::string& name);

  const std::string& folder() const { return folder_; }
  at::Tensor tensor(const std::string& name) const;  ///< as f64
  double number(const std::string& name) const;      ///< of a [1] tensor
  bool contains(const std::string& name) const { return file_.contains(name); }
  std::vector<std::string> names(const std::string& prefix) const;

  const TokenFile& task() const { return *task_; }
  const TokenFile& align() const { return *align_; }
  /// Objectives with the gold reference's hidden states; `all_positions`: the KL over every
  /// position.
  std::vector<ObjectiveData> objectives(bool all_positions = false) const;
  /// Every sequence, dealt out to `ranks` in turn; the draws of `rank`.
  std::vector<Draw> draws(int rank, int ranks) const;

  /// Weights of the folder, with the gold adapters where names ask for them.
  std::unique_ptr<WeightSource> weights_with_adapters(std::unique_ptr<WeightSource> base) const;
  /// A source whose every tensor is the gold reference's head.
  std::unique_ptr<WeightSource> reference_head() const;

 private:
  std::string folder_;
  SafetensorsFile file_;
  std::unique_ptr<TokenFile> task_, align_;
};

/// Gradient of objective k of every Hugging Face tensor, f64, gathered from all shards. Collective.
std::map<std::string, at::Tensor> gather_gradients(dist::Engine& engine, dist::Mesh& mesh,
                                                   size_t k);

/// |a - b| / |b|, Frobenius.
double relative_error(const at::Tensor& a, const at::Tensor& b);

}  // namespace safegrad::testing
