#include "models/open_model.h"

#include <filesystem>

#include "core/error.h"
#include "core/sha256.h"
#include "models/hf_weights.h"
#include "models/initial_weights.h"

namespace safegrad::models {
namespace {

void require_all(const Decoder& decoder, const HfWeights& weights) {
  for (size_t u = 0; u < decoder.units().size(); ++u) {
    if (static_cast<int>(u) == decoder.adapter_unit()) continue;
    for (const Parameter* p : decoder.units()[u].parameters) {
      for (const Piece& piece : p->pieces) {
        std::vector<int64_t> shape = p->shape;
        shape[0] = piece.rows;
        weights.require(piece.name, shape);
      }
    }
  }
}

std::unique_ptr<WeightSource> with_adapters(std::unique_ptr<WeightSource> base,
                                            const Decoder& decoder, uint64_t seed) {
  if (decoder.adapter_unit() < 0) return base;
  std::map<std::string, int64_t> inputs;
  for (const Parameter* p :
       decoder.units()[static_cast<size_t>(decoder.adapter_unit())].parameters) {
    if (p->name.ends_with(".lora_A.weight")) inputs[p->name] = p->shape[1];
  }
  return std::make_unique<FreshAdapters>(std::move(base), seed, std::move(inputs));
}

// What a person calls the model. Of a run's `model/` the run's own folder says more.
std::string display_name(const std::string& folder) {
  std::filesystem::path path = std::filesystem::absolute(folder).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  const bool of_a_run = path.filename() == "model" && path.parent_path().has_filename();
  return (of_a_run ? path.parent_path() : path).filename().string();
}

}  // namespace

OpenedModel open_model(const ModelSection& section, uint64_t seed, const Backend& backend) {
  const TrainableSet trainable{section.lora, section.trainable};
  OpenedModel model;
  std::unique_ptr<WeightSource> weights;
  if (!section.config.empty()) {
    model.decoder =
        std::make_unique<Decoder>(read_decoder_config(section.config), trainable, backend);
    model.name = "random weights";
    weights = std::make_unique<RandomWeights>(seed);
  } else {
    SAFEGRAD_CHECK(std::filesystem::is_directory(section.path), ModelError,
                   "{} is not a folder; give a Hugging Face model folder (config.json, "
                   "*.safetensors, tokenizer.json)",
                   section.path);
    const bool adapter = is_peft_adapter(section.path);
    const PeftAdapter peft = adapter ? read_peft_adapter(section.path) : PeftAdapter{};
    model.from_adapter = adapter;
    model.base_folder = adapter ? peft.base_model : section.path;
    model.name = display_name(section.path);
    model.decoder = std::make_unique<Decoder>(
        read_decoder_config(model.base_folder + "/config.json"), trainable, backend);
    if (adapter) {
      auto merged = std::make_unique<MergedAdapterWeights>(section.path, peft);
      require_all(*model.decoder, merged->base());
      weights = std::move(merged);
    } else {
      auto plain = std::make_unique<HfWeights>(section.path);
      require_all(*model.decoder, *plain);
      weights = std::move(plain);
    }
    const std::string tokenizer = model.base_folder + "/tokenizer.json";
    if (std::filesystem::exists(tokenizer)) model.tokenizer_sha256 = sha256_of_file(tokenizer);
  }
  model.weights = with_adapters(std::move(weights), *model.decoder, seed);
  return model;
}

OpenedModel open_model_shape(const ModelSection& section, uint64_t seed, const Backend& backend) {
  OpenedModel model;
  std::string config = section.config;
  model.name = std::filesystem::path(config).stem().string();
  if (config.empty()) {
    model.from_adapter = is_peft_adapter(section.path);
    model.base_folder =
        model.from_adapter ? read_peft_adapter(section.path).base_model : section.path;
    model.name = display_name(section.path);
    config = model.base_folder + "/config.json";
  }
  const std::string tokenizer = model.base_folder + "/tokenizer.json";
  if (!model.base_folder.empty() && std::filesystem::exists(tokenizer))
    model.tokenizer_sha256 = sha256_of_file(tokenizer);
  model.decoder = std::make_unique<Decoder>(read_decoder_config(config),
                                            TrainableSet{section.lora, section.trainable}, backend);
  model.weights = with_adapters(std::make_unique<RandomWeights>(seed), *model.decoder, seed);
  return model;
}

}  // namespace safegrad::models
