// open_model.h: from a config's model section to a decoder and the weights it starts from.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "core/config.h"
#include "core/weight_source.h"
#include "models/decoder.h"

namespace safegrad::models {

struct OpenedModel {
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<WeightSource> weights;
  std::string base_folder;       ///< Hugging Face folder; empty for random weights
  std::string tokenizer_sha256;  ///< of base_folder/tokenizer.json; empty if there is none
  std::string name;              ///< for people: the folder's name
  bool from_adapter = false;     ///< a PEFT adapter is merged into the weights
};

/// Opens a Hugging Face folder, a PEFT adapter folder (merged into its base while reading) or a
/// bare config.json (random weights), and checks that every parameter exists with the right shape.
/// Maps files, reads no weights; the decoder computes on `backend`. Throws ModelError or
/// ConfigError.
OpenedModel open_model(const ModelSection& section, uint64_t seed, const Backend& backend);

/// The same with random weights in place of the folder's: only config.json is needed (of a PEFT
/// adapter its base model's). For plans.
OpenedModel open_model_shape(const ModelSection& section, uint64_t seed, const Backend& backend);

}  // namespace safegrad::models
