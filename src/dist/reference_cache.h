// reference_cache.h: the reference model for free: its last hidden states at the scored positions,
// computed once (design §4).
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/pack.h"
#include "core/safetensors.h"
#include "dist/engine.h"

namespace safegrad::dist {

/// D numbers per scored position instead of V logits: p_ref = softmax(h_ref W_refᵀ) is one GEMM per
/// chunk during training. One file a rank in `folder`, keyed by the fingerprints of model and data;
/// every rank maps all of them, so the folder is on a file system that all ranks see.
class ReferenceCache {
 public:
  /// Uses a complete cache that is there, else runs one sharded forward pass over the data with the
  /// adapters off. Collective; call it before the first update. Throws RunError (path) if the
  /// folder cannot be written or a part is not visible here.
  ReferenceCache(Engine& engine, Mesh& mesh, const ObjectiveData& data, uint64_t model_fingerprint,
                 int64_t max_tokens, const std::string& folder);

  /// [rows, D] of sample i's scored rows, in the compute dtype.
  at::Tensor rows(int64_t sample) const;

 private:
  std::string part_path(int part, int parts) const;
  int parts_on_disk(Communicator& world) const;
  void compute(Engine& engine, Mesh& mesh, const ObjectiveData& data, int64_t max_tokens);
  void map_parts(int parts, const ObjectiveData& data, int64_t width);

  std::string stem_;
  at::ScalarType dtype_;
  int64_t width_;
  std::vector<SafetensorsFile> parts_;
  struct Place {
    size_t part;
    int64_t row, rows;
  };
  std::vector<Place> places_;  // by sample
};

}  // namespace safegrad::dist
