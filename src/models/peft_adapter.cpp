// The PEFT half of hf_weights.h: adapters and their merging into a base model.
#include <algorithm>
#include <filesystem>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "models/hf_weights.h"

namespace safegrad::models {
namespace {

using nlohmann::json;

constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";
constexpr int64_t kMaxConfigBytes = 16 << 20;
constexpr int64_t kMaxRank = 1 << 16;

/// Settings that say nothing about the formula, or are read below. PEFT gains variants of LoRA with
/// every version, so any other setting must be absent, null, false or empty.
constexpr std::string_view kUnderstood[] = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
};

std::string in_folder(const std::string& folder, const char* name) {
  return (std::filesystem::path(folder) / name).string();
}

void check_plain(const JsonObject& root, const json& document) {
  if (root.string("peft_type") != "LORA") root.refuse("peft_type", "\"LORA\"");
  if (root.string("bias", "none") != "none") root.refuse("bias", "\"none\"");
  for (const auto& [key, value] : document.items()) {
    const bool neutral =
        value.is_null() || value == false || (value.is_structured() && value.empty());
    if (!neutral && std::ranges::find(kUnderstood, key) == std::end(kUnderstood)) {
      root.refuse(key, "null, false or empty: only plain LoRA can be merged");
    }
  }
  // The other ways to start an adapter (PiSSA, OLoRA, LoftQ, CorDA) change the base's weights too.
  const json* start = root.find("init_lora_weights");
  if (start != nullptr && !start->is_boolean() && *start != "gaussian" && *start != "eva" &&
      *start != "orthogonal") {
    root.refuse("init_lora_weights", "true, false, \"gaussian\", \"eva\" or \"orthogonal\"");
  }
}

std::string resolve_base(const std::string& folder, const std::string& name) {
  const std::string beside = in_folder(folder, name.c_str());
  std::error_code ignored;
  for (const std::string& place : {name, beside}) {
    if (std::filesystem::is_directory(place, ignored)) return place;
  }
  throw ModelError(fmt::format(
      "{}: base_model_name_or_path: no folder \"{}\" and no folder \"{}\"; download the "
      "base model and write its path there",
      in_folder(folder, kConfigFile), printable(name, 300), printable(beside, 300)));
}

PeftAdapter read_adapter(const std::string& folder, bool find_base) {
  const std::string path = in_folder(folder, kConfigFile);
  const json document = parse_json(read_small_file(path, kMaxConfigBytes), path);
  const JsonObject root(document, path);
  check_plain(root, document);
  PeftAdapter adapter;
  adapter.rank = root.integer("r", 1, kMaxRank);
  adapter.alpha = root.positive("lora_alpha");
  const json* targets = root.find("target_modules");
  if (targets == nullptr) root.refuse("target_modules", "a list of names, or one expression");
  adapter.targets = targets->is_string() ? std::vector{targets->get<std::string>()}
                                         : string_list(*targets, path + ": target_modules");
  std::sort(adapter.targets.begin(), adapter.targets.end());  // PEFT writes a set: any order
  const std::string base = root.string("base_model_name_or_path");
  if (base.empty() || base.find('\0') != std::string::npos) {
    root.refuse("base_model_name_or_path", "the path of a folder");
  }
  adapter.base_model = find_base ? resolve_base(folder, base) : base;
  return adapter;
}

constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kSuffixA = ".lora_A.weight", kSuffixB = ".lora_B.weight";

/// "base_model.model.X.lora_A.weight" -> X; empty if the name is built otherwise.
std::string_view module_of(std::string_view name, std::string_view suffix) {
  if (!name.starts_with(kPrefix) || !name.ends_with(suffix) ||
      name.size() <= kPrefix.size() + suffix.size()) {
    return {};
  }
  return name.substr(kPrefix.size(), name.size() - kPrefix.size() - suffix.size());
}

std::vector<float> read_all(const SafetensorsFile& file, const std::string& name) {
  const TensorView& tensor = file.at(name);
  SAFEGRAD_CHECK(is_float(tensor.dtype), ModelError,
                 "{}: tensor \"{}\" is {}; allowed: F32, F16, BF16", file.path(), printable(name),
                 name_of(tensor.dtype));
  std::vector<float> out(static_cast<size_t>(tensor.numel()));
  read_as_float(tensor, 0, tensor.numel(), out.data());
  return out;
}

}  // namespace

bool is_peft_adapter(const std::string& folder) {
  std::error_code ignored;
  return std::filesystem::exists(in_folder(folder, kConfigFile), ignored);
}

PeftAdapter read_peft_adapter(const std::string& folder, bool find_base) {
  return rethrow_as<ModelError>([&] { return read_adapter(folder, find_base); });
}

MergedAdapterWeights::MergedAdapterWeights(const std::string& adapter_folder,
                                           const PeftAdapter& adapter)
    : base_(adapter.base_model), scale_(adapter.alpha / static_cast<double>(adapter.rank)) {
  rethrow_as<ModelError>([&] {
    const SafetensorsFile file(in_folder(adapter_folder, kWeightsFile));
    SAFEGRAD_CHECK(!file.tensors().empty(), ModelError,
                   "{}: has no tensors, an adapter has a lora_A and a lora_B for each weight it "
                   "changes",
                   file.path());
    for (const auto& [name, tensor] : file.tensors()) {
      const std::string_view module = module_of(name, kSuffixA);
      if (!module.empty()) {
        add_delta(file, std::string(module), adapter.rank);
        continue;
      }
      const std::string_view other = module_of(name, kSuffixB);
      SAFEGRAD_CHECK(!other.empty(), ModelError,
                     "{}: unknown tensor \"{}\"; allowed: {}MODULE{} and {}MODULE{}", file.path(),
                     printable(name), kPrefix, kSuffixA, kPrefix, kSuffixB);
      const std::string partner = fmt::format("{}{}{}", kPrefix, other, kSuffixA);
      SAFEGRAD_CHECK(file.contains(partner), ModelError,
                     "{}: has \"{}\" but not \"{}\"; the adapter is incomplete", file.path(),
                     printable(name), printable(partner));
    }
  });
}

void MergedAdapterWeights::add_delta(const SafetensorsFile& file, const std::string& module,
                                     int64_t rank) {
  const std::string name_a = fmt::format("{}{}{}", kPrefix, module, kSuffixA);
  const std::string name_b = fmt::format("{}{}{}", kPrefix, module, kSuffixB);
  const std::vector<int64_t>&a = file.at(name_a).shape, &b = file.at(name_b).shape;
  const std::string target = module + ".weight";
  SAFEGRAD_CHECK(
      base_.contains(target), ModelError,
      "{}: changes \"{}\", which the base model lacks; is base_model_name_or_path right?",
      file.path(), printable(target));
  const std::vector<int64_t>& shape = base_.shape(target);
  const bool fits =
      shape.size() == 2 && a == std::vector{rank, shape[1]} && b == std::vector{shape[0], rank};
  SAFEGRAD_CHECK(fits, ModelError,
                 "{}: module \"{}\" has lora_A [{}] and lora_B [{}], which do not fit rank {} and "
                 "the base model's weight [{}] (A [rank, in], B [out, rank]); is "
                 "base_model_name_or_path right?",
                 file.path(), printable(module), fmt::join(a, ", "), fmt::join(b, ", "), rank,
                 fmt::join(shape, ", "));
  deltas_[target] = {read_all(file, name_a), read_all(file, name_b), rank, shape[1], shape[0]};
}

void MergedAdapterWeights::read(const std::string& name, int64_t begin, int64_t end,
                                float* out) const {
  base_.read(name, begin, end, out);
  const auto it = deltas_.find(name);
  if (it == deltas_.end()) return;

  const Delta& delta = it->second;
  std::vector<double> row(static_cast<size_t>(delta.in));
  for (int64_t at = begin; at < end;) {
    const int64_t i = at / delta.in, first = at % delta.in;
    const int64_t n = std::min(delta.in - first, end - at);
    std::fill_n(row.begin(), n, 0.0);
    // A product of two floats is exact in double, so an element has the same bits whether or not
    // the compiler fuses the addition, and wherever the range begins.
    for (int64_t r = 0; r < delta.rank; ++r) {
      const double b = delta.b[i * delta.rank + r];
      const float* a = delta.a.data() + r * delta.in + first;
      for (int64_t j = 0; j < n; ++j) row[j] += b * a[j];
    }
    for (int64_t j = 0; j < n; ++j) out[at - begin + j] += static_cast<float>(scale_ * row[j]);
    at += n;
  }
}

}  // namespace safegrad::models
