#include "models/hf_export.h"

#include <filesystem>
#include <functional>
#include <numeric>
#include <regex>
#include <set>

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"

namespace safegrad::models {
namespace {

int64_t bytes_of(const SafetensorsWriter::Entry& entry) {
  return std::accumulate(entry.shape.begin(), entry.shape.end(), size_of(entry.dtype),
                         std::multiplies<>());
}

// Names that exports give to files about weights, and no others.
bool is_weight_file(const std::string& name) {
  const std::regex weights(R"((adapter_)?model(-\d{5}-of-\d{5})?\.safetensors)");
  return std::regex_match(name, weights) || name == "model.safetensors.index.json" ||
         name == "adapter_config.json";
}

std::set<std::string> names_in(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    names.insert(entry.path().filename().string());
  return names;
}

void require_written(const std::error_code& failed, const std::string& path) {
  SAFEGRAD_CHECK(!failed, RunError, "{}: cannot write here: {}", path, failed.message());
}

}  // namespace

HfExport::HfExport(ExportTarget target) : target_(std::move(target)) {}

void HfExport::begin(const std::vector<ExportEntry>& entries) {
  std::error_code failed;
  std::filesystem::remove_all(staging(), failed);  // of an export that did not end
  require_written(failed, staging());
  std::filesystem::create_directories(staging(), failed);
  require_written(failed, staging());
  const Dtype dtype = target_.dtype == ComputeDtype::bfloat16 ? Dtype::bf16 : Dtype::f32;
  int64_t bytes = 0;
  for (const ExportEntry& entry : entries) {
    const SafetensorsWriter::Entry tensor{entry.name, dtype, entry.shape};
    if (files_.empty() || bytes + bytes_of(tensor) > target_.file_bytes) {
      files_.emplace_back();
      bytes = 0;
    }
    files_.back().push_back(tensor);
    bytes += bytes_of(tensor);
  }
  const std::string stem = target_.adapter ? "adapter_model" : "model";
  for (size_t i = 0; i < files_.size(); ++i) {
    names_.push_back(files_.size() == 1 ? stem + ".safetensors"
                                        : fmt::format("{}-{:05}-of-{:05}.safetensors", stem, i + 1,
                                                      files_.size()));
  }
  open_next_file();
}

void HfExport::open_next_file() {
  writer_ =
      std::make_unique<SafetensorsWriter>(staging() + "/" + names_[file_], files_[file_],
                                          std::map<std::string, std::string>{{"format", "pt"}});
  in_file_ = 0;
}

void HfExport::put(const std::string& name, const at::Tensor& value) {
  const SafetensorsWriter::Entry& expected = files_[file_][in_file_];
  SAFEGRAD_CHECK(name == expected.name && value.sizes() == at::IntArrayRef(expected.shape),
                 UsageError, "export: got tensor {}, expected {}", name, expected.name);
  const at::Tensor tensor =
      value.to(at::kCPU, expected.dtype == Dtype::bf16 ? at::kBFloat16 : at::kFloat).contiguous();
  writer_->append({static_cast<const std::byte*>(tensor.const_data_ptr()),
                   static_cast<size_t>(tensor.nbytes())});
  if (++in_file_ < files_[file_].size()) return;
  writer_->finish();
  writer_.reset();
  if (++file_ < files_.size()) open_next_file();
}

void HfExport::finish() {
  SAFEGRAD_CHECK(file_ == files_.size(), UsageError, "export: {} of {} files were written", file_,
                 files_.size());
  if (files_.size() > 1) write_index();
  if (target_.adapter) write_adapter_config();
  copy_companions();
  move_into_place();
}

void HfExport::write_index() const {
  nlohmann::ordered_json index;
  int64_t total = 0;
  for (size_t i = 0; i < files_.size(); ++i) {
    for (const SafetensorsWriter::Entry& entry : files_[i]) {
      index["weight_map"][entry.name] = names_[i];
      total += bytes_of(entry);
    }
  }
  index["metadata"]["total_size"] = total;
  write_file_atomically(staging() + "/model.safetensors.index.json", index.dump(2) + "\n");
}

void HfExport::write_adapter_config() const {
  const LoraConfig& lora = *target_.adapter;
  const nlohmann::ordered_json config = {{"peft_type", "LORA"},
                                         {"task_type", "CAUSAL_LM"},
                                         {"base_model_name_or_path", target_.base_folder},
                                         {"r", lora.rank},
                                         {"lora_alpha", lora.alpha},
                                         {"lora_dropout", lora.dropout},
                                         {"target_modules", lora.targets},
                                         {"bias", "none"},
                                         {"fan_in_fan_out", false},
                                         {"inference_mode", true},
                                         {"use_rslora", false},
                                         {"use_dora", false},
                                         {"modules_to_save", nullptr}};
  write_file_atomically(staging() + "/adapter_config.json", config.dump(2) + "\n");
}

// Everything small beside the weights: configs, tokenizer, chat template, licence.
void HfExport::copy_companions() const {
  namespace fs = std::filesystem;
  if (target_.base_folder.empty()) {
    if (!target_.config_json.empty()) {
      write_file_atomically(staging() + "/config.json",
                            read_small_file(target_.config_json, 1 << 24));
    }
    return;
  }
  for (const auto& entry : fs::directory_iterator(target_.base_folder)) {
    const std::string name = entry.path().filename().string(),
                      extension = entry.path().extension().string();
    const bool wanted = extension == ".json" || extension == ".jinja" || extension == ".txt" ||
                        extension == ".model" || name.starts_with("LICENSE");
    const bool belongs_to_base =
        name.ends_with(".safetensors.index.json") || (target_.adapter && name == "config.json");
    if (!entry.is_regular_file() || !wanted || belongs_to_base) continue;
    write_file_atomically(staging() + "/" + name,
                          read_small_file(entry.path().string(), int64_t{1} << 28));
  }
}

void HfExport::move_into_place() const {
  namespace fs = std::filesystem;
  std::error_code failed;
  fs::create_directories(target_.folder, failed);
  require_written(failed, target_.folder);
  const std::set<std::string> old = names_in(target_.folder), made = names_in(staging());
  for (const std::string& name : made) {
    fs::rename(staging() + "/" + name, target_.folder + "/" + name, failed);
    require_written(failed, target_.folder);
  }
  for (const std::string& name : old) {
    // With a config.json peft would take an adapter's folder for a whole model.
    const bool misleads = is_weight_file(name) || (target_.adapter && name == "config.json");
    if (made.contains(name) || !misleads) continue;
    fs::remove(target_.folder + "/" + name, failed);
    require_written(failed, target_.folder + "/" + name);
  }
  sync_folder_of(target_.folder + "/config.json");
  fs::remove(staging(), failed);
}

}  // namespace safegrad::models
