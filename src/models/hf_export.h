// hf_export.h: writes what people take away: a Hugging Face folder, or a PEFT adapter folder.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/model_sink.h"
#include "core/safetensors.h"

namespace safegrad::models {

struct ExportTarget {
  std::string folder;  ///< made if needed
  std::string
      base_folder;  ///< whose config, tokenizer and template files come along (may be empty)
  std::string config_json;  ///< config.json to copy; with base_folder empty
  ComputeDtype dtype = ComputeDtype::float32;
  std::optional<LoraConfig> adapter;      ///< set: a PEFT adapter folder for base_folder
  int64_t file_bytes = int64_t{4} << 30;  ///< a larger model is divided into files of this size
};

/// Full or merged weights go to model.safetensors, or beyond `file_bytes` to numbered files with an
/// index; adapters to adapter_model.safetensors with adapter_config.json. transformers and peft
/// load the folder as it is. Everything is written beside the destination first; finish() moves it
/// in and removes weight files of an earlier export that would be taken for a part of this one.
class HfExport : public ModelSink {
 public:
  explicit HfExport(ExportTarget target);
  void begin(const std::vector<ExportEntry>& entries) override;
  void put(const std::string& name, const at::Tensor& value) override;
  void finish() override;

 private:
  std::string staging() const { return target_.folder + ".partial"; }
  void open_next_file();
  void write_index() const;
  void write_adapter_config() const;
  void copy_companions() const;
  void move_into_place() const;

  ExportTarget target_;
  std::vector<std::vector<SafetensorsWriter::Entry>> files_;  // entries of each file
  std::vector<std::string> names_;                            // their file names
  std::unique_ptr<SafetensorsWriter> writer_;
  size_t file_ = 0, in_file_ = 0;
};

}  // namespace safegrad::models
