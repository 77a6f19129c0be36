#include "inspect.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "core/token_file.h"
#include "core/words.h"
#include "core/yaml_tree.h"
#include "describe.h"
#include "dist/checkpoint_files.h"
#include "models/hf_config.h"
#include "models/hf_weights.h"

namespace safegrad {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxManifestBytes = 16 << 20;
constexpr size_t kMaxPath = 300;  // characters shown

std::string human(double count) {
  for (const char* unit : {"", " k", " M", " G"}) {
    if (count < 1000) return fmt::format("{:.{}f}{}", count, *unit ? 2 : 0, unit);
    count /= 1000;
  }
  return fmt::format("{:.2f} T", count);
}

std::string human_bytes(double bytes) {
  return human(bytes) + "B";
}

// Every text that a file holds is shown through printable(): it would otherwise reach the terminal
// with its control characters.
std::string printable_list(const std::vector<std::string>& texts) {
  std::vector<std::string> shown;
  for (const std::string& text : texts) shown.push_back(printable(text));
  return fmt::format("{}", fmt::join(shown, ", "));
}

// As a shell reads it back: inside single quotes only another one has a meaning.
std::string shell_quoted(const std::string& text) {
  std::string quoted = "'";
  for (const char c : text) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

struct Tensors {
  int64_t tensors = 0, elements = 0, bytes = 0;
  std::map<std::string, int64_t> by_dtype;  // elements

  void add(const SafetensorsFile& file) {
    for (const auto& [name, tensor] : file.tensors()) {
      ++tensors;
      elements += tensor.numel();
      bytes += static_cast<int64_t>(tensor.bytes.size());
      by_dtype[name_of(tensor.dtype)] += tensor.numel();
    }
  }
  std::string text() const {
    std::vector<std::string> dtypes;
    for (const auto& [dtype, count] : by_dtype)
      dtypes.push_back(by_dtype.size() > 1
                           ? fmt::format("{} {}", human(static_cast<double>(count)), dtype)
                           : dtype);
    return fmt::format("{} tensors, {} elements ({}), {}", tensors,
                       human(static_cast<double>(elements)), fmt::join(dtypes, ", "),
                       human_bytes(static_cast<double>(bytes)));
  }
};

std::string inspect_tokens(const std::string& path) {
  std::vector<std::string> warnings;
  const TokenFile file(path, {}, warnings);
  int64_t longest = 0;
  for (int64_t i = 0; i < file.size(); ++i) longest = std::max(longest, file.length(i));
  std::string text = fmt::format(
      "{}: token file\n  {} sequences, {} tokens ({} scored), longest {}\n  content {:016x}\n",
      path, file.size(), file.total_tokens(), file.total_scored(), longest, file.fingerprint());
  if (file.has_sources()) {
    std::map<std::string, int64_t> counts;
    for (int64_t i = 0; i < file.size(); ++i)
      ++counts[file.sources()[static_cast<size_t>(file.source(i))]];
    for (const auto& [name, count] : counts)
      text += fmt::format("  source {}: {} sequences ({:.1f} %)\n", printable(name), count,
                          100.0 * static_cast<double>(count) / static_cast<double>(file.size()));
  }
  if (file.has_choices())
    text += fmt::format("  {} choice groups of the classes {}\n", file.groups(),
                        printable_list(file.classes()));
  return text;
}

std::string inspect_file(const std::string& path) {
  const SafetensorsFile file(path);
  const auto& metadata = file.metadata();
  const auto format = metadata.find("format");
  if (format != metadata.end() && format->second.starts_with("safegrad.tokens/"))
    return inspect_tokens(path);
  Tensors tensors;
  tensors.add(file);
  std::string text = fmt::format("{}: safetensors file\n  {}\n", path, tensors.text());
  for (const auto& [key, value] : metadata)
    text += fmt::format("  {} = {}\n", printable(key), printable(value));
  return text;
}

std::string inspect_model(const std::string& folder) {
  const models::DecoderConfig c = models::read_decoder_config(folder + "/config.json");
  Tensors tensors;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors")
      tensors.add(SafetensorsFile(entry.path().string()));
  }
  return fmt::format(
      "{}: model folder, {}\n  {} layers, width {}, {} heads ({} for keys and values), vocabulary "
      "{}, "
      "{} positions{}\n  {}\n  {}\n",
      folder, printable(c.architecture), c.layers, c.hidden_size, c.heads, c.kv_heads, c.vocab_size,
      c.max_positions, c.tied_embeddings ? ", tied embeddings" : "",
      tensors.tensors > 0 ? tensors.text() : "no *.safetensors: shape only",
      fs::exists(folder + "/tokenizer.json") ? "with tokenizer.json" : "without tokenizer.json");
}

std::string inspect_adapter(const std::string& folder) {
  const models::PeftAdapter a = models::read_peft_adapter(folder, /*find_base=*/false);
  std::error_code ignored;
  const bool found =
      fs::exists(a.base_model, ignored) || fs::exists(fs::path(folder) / a.base_model, ignored);
  Tensors tensors;
  tensors.add(SafetensorsFile(folder + "/adapter_model.safetensors"));
  return fmt::format(
      "{}: PEFT adapter folder, LoRA\n  rank {}, alpha {:g}, on {}\n  of {}{}\n  {}\n", folder,
      a.rank, a.alpha, printable_list(a.targets), printable(a.base_model, kMaxPath),
      found ? "" : ", which is not found from here", tensors.text());
}

std::string inspect_checkpoint(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  const dist::Manifest m = dist::parse_manifest(read_small_file(path, kMaxManifestBytes), path);
  Tensors tensors;
  for (int64_t i = 0; i < m.shards; ++i)
    tensors.add(SafetensorsFile(fmt::format("{}/{}", folder, dist::shard_name(i, m.shards))));
  std::string text = fmt::format(
      "{}: checkpoint after step {} ({})\n  written by {}, {}; goes on with "
      "any number\n  {}\n",
      folder, m.step, counted(m.updates, "update"), counted(m.ranks, "rank"),
      counted(m.shards, "shard"), tensors.text());
  for (const auto& [name, version] : m.versions)
    text += fmt::format("  {} {}\n", printable(name), printable(version));
  for (const auto& [name, print] : m.inputs)
    text += fmt::format("  {}: {}\n", printable(name), printable(print));
  return text + fmt::format("  its files are checked by: cd {} && sha256sum -c SHA256SUMS\n",
                            shell_quoted(folder));
}

struct Lines {
  int64_t count = 0;
  std::string last, probed;  // the last line, and the last one with results of probes
};

Lines complete_lines(const std::string& path) {
  std::ifstream stream(path);
  Lines lines;
  for (std::string line; std::getline(stream, line) && !stream.eof();) {
    ++lines.count;
    if (line.find("\"probe\":") != std::string::npos) lines.probed = line;
    lines.last = std::move(line);
  }
  return lines;
}

std::string describe_probes(const std::string& line) {
  const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!record.is_object() || !record.contains("probe") || !record["probe"].is_object()) return "";
  std::string text;
  for (const auto& [name, measures] : record["probe"].items()) {
    std::map<std::string, double> values;
    for (const auto& [measure, value] : measures.items()) {
      if (value.is_number()) values[printable(measure)] = value.get<double>();
    }
    text += fmt::format("  probe {}:{}\n", printable(name), measures_in_words(values));
  }
  return text;
}

// The model is moved in after the last step: an older one is a run's before.
std::string describe_model(const std::string& folder) {
  std::error_code failed;
  const auto model = fs::last_write_time(folder + "/model", failed);
  const auto metrics = fs::last_write_time(folder + "/metrics.jsonl", failed);
  return failed || model < metrics
             ? fmt::format("  not finished; {}/model is of an earlier run\n", folder)
             : fmt::format("  finished: the model is in {}/model\n", folder);
}

// Key by key, not as a config is read: an older version's may have keys that this one lacks.
std::string inspect_run(const std::string& folder) {
  const YamlTree config(folder + "/config.yaml");
  const auto value_of = [&](const char* key) {
    const YamlValue* value = config.find(key);
    return value ? printable(value->text, kMaxPath) : std::string();
  };
  const std::string rank = value_of("model.lora.rank"), path = value_of("model.path");
  std::string text = fmt::format(
      "{}: run folder, rule {}{} on {}\n", folder, value_of("objective.rule"),
      rank.empty() ? "" : ", LoRA rank " + rank, path.empty() ? value_of("model.config") : path);
  const std::string metrics = folder + "/metrics.jsonl", steps = value_of("train.steps");
  if (fs::exists(metrics)) {
    const Lines lines = complete_lines(metrics);
    const auto record = nlohmann::json::parse(lines.last, nullptr, /*allow_exceptions=*/false);
    if (record.is_object()) {
      // A line that others wrote may have a step that is no number: value() would throw.
      const auto step = record.find("step");
      text += fmt::format("  {}{} recorded", counted(lines.count, "step"),
                          steps.empty() ? "" : " of " + steps);
      if (step != record.end() && step->is_number_integer())
        text += fmt::format("; the last is {}", step->get<int64_t>());
      for (const char* key : {"loss_task", "loss_align", "cosine"}) {
        if (record.contains(key) && record[key].is_number())
          text += fmt::format(", {} {:.4g}", key, record[key].get<double>());
      }
      text += "\n";
    }
    text += describe_probes(lines.probed);
  }
  const auto checkpoints = dist::list_checkpoints(folder + "/checkpoints");
  if (!checkpoints.empty())
    text += fmt::format("  checkpoints after steps {}\n", fmt::join(checkpoints, ", "));
  if (fs::exists(folder + "/model")) text += describe_model(folder);
  if (fs::exists(folder + "/flight")) {
    for (const auto& entry : fs::directory_iterator(folder + "/flight"))
      text += fmt::format("  stood still once: see {}/flight/{}/report.txt\n", folder,
                          printable(entry.path().filename().string()));
  }
  return text;
}

std::string inspect_audit(const std::string& folder) {
  return fmt::format(
      "{0}: folder of an audit\n  {1} scored, the worst first, in {0}/audit.jsonl; "
      "tools/audit.py shows them\n",
      folder, counted(complete_lines(folder + "/audit.jsonl").count, "sample"));
}

std::string inspect_checkpoints(const std::string& folder) {
  const auto steps = dist::list_checkpoints(folder);
  return fmt::format("{0}: checkpoints after steps {1}\n  safegrad inspect {0}/{2} says more\n",
                     folder, fmt::join(steps, ", "), dist::checkpoint_name(steps.back()));
}

/// The folder that a run keeps beside its checkpoints, empty text if this is none.
std::string inspect_reference(const std::string& folder) {
  Tensors tensors;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".safetensors") continue;
    const SafetensorsFile file(entry.path().string());
    const auto format = file.metadata().find("format");
    if (format != file.metadata().end() && format->second.starts_with("safegrad.reference/"))
      tensors.add(file);
  }
  if (tensors.tensors == 0) return "";
  return fmt::format(
      "{}: hidden states of the start model, which a run into the same folder need not compute "
      "again\n  {}\n",
      folder, tensors.text());
}

}  // namespace

std::string inspect(const std::string& given) {
  std::string path = given;
  while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  auto has = [&](const char* name) { return fs::exists(fmt::format("{}/{}", path, name)); };
  SAFEGRAD_CHECK(fs::exists(path), InputError, "{}: no such file or folder", path);
  if (!fs::is_directory(path)) {
    SAFEGRAD_CHECK(path.ends_with(".safetensors"), InputError,
                   "{}: files of the kind *.safetensors are looked into, and folders; for a config "
                   "there is safegrad check",
                   path);
    return inspect_file(path);
  }
  if (has("manifest.json")) return inspect_checkpoint(path);
  if (has("adapter_config.json")) return inspect_adapter(path);
  if (has("config.yaml") && has("metrics.jsonl")) return inspect_run(path);
  if (has("config.json")) return inspect_model(path);
  if (has("audit.jsonl")) return inspect_audit(path);
  if (!dist::list_checkpoints(path).empty()) return inspect_checkpoints(path);
  const std::string reference = inspect_reference(path);
  SAFEGRAD_CHECK(!reference.empty(), InputError,
                 "{}: neither a model (config.json), an adapter (adapter_config.json), a "
                 "checkpoint (manifest.json), a run (config.yaml and metrics.jsonl), an audit "
                 "(audit.jsonl), nor a run's checkpoints or reference",
                 path);
  return reference;
}

}  // namespace safegrad
