// hf_weights.h: the weights of a Hugging Face folder, mapped; single file or indexed shards,
// f32/f16/bf16.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "core/weight_source.h"

namespace safegrad::models {

/// Opens FOLDER/model.safetensors, or every file named by FOLDER/model.safetensors.index.json.
/// Tensors that the index does not name are ignored. Throws ModelError: no such file, an index that
/// names a missing file or tensor, a path that leaves the folder, damaged headers.
class HfWeights : public WeightSource {
 public:
  explicit HfWeights(const std::string& folder);

  /// Throws ModelError (folder, tensor, both shapes) if the tensor is missing, has another shape or
  /// is not f32/f16/bf16.
  void require(const std::string& name, const std::vector<int64_t>& shape) const;
  bool contains(const std::string& name) const;
  /// Throws ModelError if the tensor is missing, as read() does too.
  const std::vector<int64_t>& shape(const std::string& name) const;
  void read(const std::string& name, int64_t begin, int64_t end, float* out) const override;

 private:
  const TensorView& find(const std::string& name) const;

  std::string folder_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, const TensorView*> tensors_;
};

/// What a PEFT LoRA adapter folder says about itself (adapter_config.json).
struct PeftAdapter {
  std::string base_model;  ///< base_model_name_or_path, resolved against the working directory,
                           ///< then the adapter folder
  int64_t rank = 0;
  double alpha = 0;
  std::vector<std::string> targets;  ///< sorted; an expression in place of a list is one entry
};

/// True if FOLDER has adapter_config.json.
bool is_peft_adapter(const std::string& folder);
/// Throws ModelError for anything but plain LoRA (peft_type, use_dora, use_rslora, bias other than
/// none, modules_to_save, rank_pattern, an initialisation that changes the base, ...), and where
/// the base model is not found. Without `find_base`, base_model is what the file says.
PeftAdapter read_peft_adapter(const std::string& folder, bool find_base = true);

/// A base model with a PEFT adapter merged into it while reading: W + (alpha / rank) B A, computed
/// for the rows asked for. Files: adapter_model.safetensors with
///   base_model.model.MODULE.lora_A.weight [rank, in] and ...lora_B.weight [out, rank]
/// for the base's MODULE.weight [out, in]. Throws ModelError for any other name or shape.
class MergedAdapterWeights : public WeightSource {
 public:
  MergedAdapterWeights(const std::string& adapter_folder, const PeftAdapter& adapter);
  const HfWeights& base() const { return base_; }
  void read(const std::string& name, int64_t begin, int64_t end, float* out) const override;

 private:
  struct Delta {
    std::vector<float> a, b;  // [rank, in], [out, rank]
    int64_t rank, in, out;
  };
  void add_delta(const SafetensorsFile& file, const std::string& module, int64_t rank);

  HfWeights base_;
  double scale_;
  std::map<std::string, Delta> deltas_;  // by the name of the weight they change
};

}  // namespace safegrad::models
