#include "models/hf_weights.h"

#include <filesystem>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"

namespace safegrad::models {
namespace {

using nlohmann::json;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr int64_t kMaxIndexBytes = 64 << 20;

std::string in_folder(const std::string& folder, const std::string& name) {
  return (std::filesystem::path(folder) / name).string();
}

bool exists(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

/// Tensor name -> file name, as an index says; file names are checked to stay inside the folder.
std::map<std::string, std::string> read_index(const std::string& path) {
  const json document = parse_json(read_small_file(path, kMaxIndexBytes), path);
  const JsonObject root(document, path);
  const json* value = root.find("weight_map");
  if (value == nullptr || !value->is_object() || value->empty()) {
    root.refuse("weight_map", "an object of tensor names and file names");
  }
  const JsonObject weight_map(*value, path + ": weight_map");
  std::map<std::string, std::string> files;
  for (const auto& item : value->items()) {
    const std::string& name = item.key();
    const std::string file = weight_map.string(name);
    // A zero byte would end the name early for the system but not for this check.
    const bool plain = file.find('/') == std::string::npos &&
                       file.find('\0') == std::string::npos && file.ends_with(".safetensors");
    SAFEGRAD_CHECK(
        plain, ModelError,
        "{}: weight_map: \"{}\" is in \"{}\"; allowed: the name of a .safetensors file in "
        "the same folder",
        path, printable(name), printable(file));
    files[name] = file;
  }
  return files;
}

void check_float(const std::string& file, const std::string& name, const TensorView& tensor) {
  SAFEGRAD_CHECK(is_float(tensor.dtype), ModelError,
                 "{}: tensor \"{}\" is {}; allowed: F32, F16, BF16; take an unquantised model",
                 file, printable(name), name_of(tensor.dtype));
}

}  // namespace

HfWeights::HfWeights(const std::string& folder) : folder_(folder) {
  rethrow_as<ModelError>([&] {
    const std::string single = in_folder(folder, kSingleFile);
    if (exists(single)) {
      const SafetensorsFile& file = files_.emplace_back(single);
      for (const auto& [name, tensor] : file.tensors()) tensors_[name] = &tensor;
      return;
    }
    const std::string index = in_folder(folder, kIndexFile);
    SAFEGRAD_CHECK(exists(index), ModelError,
                   "{}: has neither {} nor {}; check the path, and convert other formats to "
                   "safetensors",
                   folder, kSingleFile, kIndexFile);
    std::map<std::string, size_t> opened;
    for (const auto& [name, file] : read_index(index)) {
      const auto [it, is_new] = opened.emplace(file, files_.size());
      if (is_new) files_.emplace_back(in_folder(folder, file));
      tensors_[name] = &files_[it->second].at(name);
    }
  });
}

const TensorView& HfWeights::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  SAFEGRAD_CHECK(it != tensors_.end(), ModelError,
                 "{}: the weights have no tensor \"{}\" among their {}; do config.json and the "
                 "weights belong together?",
                 folder_, printable(name), tensors_.size());
  return *it->second;
}

void HfWeights::require(const std::string& name, const std::vector<int64_t>& shape) const {
  const TensorView& tensor = find(name);
  SAFEGRAD_CHECK(tensor.shape == shape, ModelError,
                 "{}: tensor \"{}\" has shape [{}], config.json asks for [{}]; do they belong "
                 "together?",
                 folder_, printable(name), fmt::join(tensor.shape, ", "), fmt::join(shape, ", "));
  check_float(folder_, name, tensor);
}

bool HfWeights::contains(const std::string& name) const {
  return tensors_.contains(name);
}

const std::vector<int64_t>& HfWeights::shape(const std::string& name) const {
  return find(name).shape;
}

void HfWeights::read(const std::string& name, int64_t begin, int64_t end, float* out) const {
  const TensorView& tensor = find(name);
  check_float(folder_, name, tensor);
  read_as_float(tensor, begin, end, out);
}

}  // namespace safegrad::models
