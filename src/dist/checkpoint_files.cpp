#include "dist/checkpoint_files.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <functional>
#include <iterator>
#include <limits>
#include <span>
#include <sstream>
#include <string_view>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/sha256.h"

namespace safegrad::dist {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFormat = "safegrad.checkpoint/1";
constexpr const char* kManifest = "manifest.json";
constexpr const char* kSums = "SHA256SUMS";
constexpr const char* kLatest = "latest";
constexpr std::string_view kStep = "step-", kUnfinished = ".tmp", kReplaced = ".old";
constexpr int64_t kMaxManifestBytes = 1 << 24, kMaxRanks = 1 << 20;
constexpr size_t kDigest = 64;

std::map<std::string, std::string> text_map(const JsonObject& json, const std::string& key) {
  const nlohmann::json* value = json.find(key);
  if (!value || !value->is_object()) json.refuse(key, "an object of texts");
  std::map<std::string, std::string> texts;
  for (const auto& [name, text] : value->items()) {
    if (!text.is_string()) json.refuse(key, "an object of texts");
    texts[name] = text.get<std::string>();
  }
  return texts;
}

/// N of "step-N" as checkpoint_name spells it.
std::optional<int64_t> step_of(const std::string& name) {
  if (name.size() <= kStep.size() || name.compare(0, kStep.size(), kStep) != 0) return {};
  int64_t step = 0;
  const char* end = name.data() + name.size();
  const auto [stopped, error] = std::from_chars(name.data() + kStep.size(), end, step);
  if (error != std::errc() || stopped != end || step < 0 || checkpoint_name(step) != name)
    return {};
  return step;
}

/// Calls `body`; a failure of the file system leaves as a RunError with its path.
void on_disk(const std::function<void()>& body) {
  try {
    body();
  } catch (const fs::filesystem_error& error) {
    throw RunError(fmt::format("{}: {}", error.path1().string(), error.code().message()));
  }
}

std::map<std::string, std::string> read_sums(const std::string& path) {
  const std::string text = read_small_file(path, kMaxManifestBytes);
  SAFEGRAD_CHECK(!text.empty() && text.back() == '\n', InputError,
                 "{}: is damaged: its last line is cut short", path);
  std::istringstream lines(text);
  std::map<std::string, std::string> sums;
  for (std::string line; std::getline(lines, line);) {
    SAFEGRAD_CHECK(line.size() > kDigest + 2 && line.compare(kDigest, 2, "  ") == 0, InputError,
                   "{}: is damaged: \"{}\" is no checksum and file name", path, printable(line));
    SAFEGRAD_CHECK(line.find('/') == std::string::npos, InputError,
                   "{}: is damaged: \"{}\" is of a file in another folder", path, printable(line));
    sums[line.substr(kDigest + 2)] = line.substr(0, kDigest);
  }
  return sums;
}

void verify_file(const std::string& folder, const std::string& name,
                 const std::map<std::string, std::string>& sums) {
  const auto sum = sums.find(name);
  SAFEGRAD_CHECK(sum != sums.end(), InputError, "{}/{}: is damaged: it has no line for {}", folder,
                 kSums, name);
  const std::string actual = sha256_of_file(folder + "/" + name);
  SAFEGRAD_CHECK(actual == sum->second, InputError,
                 "{}/{}: is damaged: its SHA-256 is {}, written was {}", folder, name, actual,
                 printable(sum->second));
}

// Each rank made its own folder where the disk is not the same for all of them. Opening a file asks
// a network file system anew, which its size alone might not.
void check_visible(const std::string& path, int64_t rank, int64_t bytes) {
  constexpr const char* kShared = "`output` must be on a file system that all ranks share";
  try {
    const InputFile file(path);
    SAFEGRAD_CHECK(file.size() == bytes, RunError, "{}: rank {} wrote {} bytes, rank 0 sees {}; {}",
                   path, rank, bytes, file.size(), kShared);
  } catch (const InputError& unseen) {
    throw RunError(fmt::format("rank {} wrote a shard that rank 0 does not see: {}; {}", rank,
                               unseen.what(), kShared));
  }
}

/// What can be resumed from instead of `folder`.
std::string alternative(const std::string& folder) {
  const fs::path path = fs::path(folder).lexically_normal();
  const fs::path parent = path.has_parent_path() ? path.parent_path() : fs::path(".");
  const auto broken = step_of(path.filename().string());
  std::vector<int64_t> steps = list_checkpoints(parent.string());
  std::erase_if(steps, [&](int64_t step) { return broken && step >= *broken; });
  if (steps.empty()) return "there is no older checkpoint; start again with another output";
  return fmt::format("the one before it: --resume {}",
                     (parent / checkpoint_name(steps.back())).string());
}

}  // namespace

std::string to_json(const Manifest& m) {
  nlohmann::ordered_json json;
  json["format"] = kFormat;
  json["step"] = m.step;
  json["updates"] = m.updates;
  if (m.align)
    json["align"] = {{"tokens", m.align->tokens}, {"loss", m.align->loss}, {"aa", m.align->aa}};
  json["ranks"] = m.ranks;
  json["shards"] = m.shards;
  json["inputs"] = m.inputs;
  json["versions"] = m.versions;
  json["config"] = m.config;
  // Paths may hold any bytes; a replaced one is better than no checkpoint.
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

Manifest parse_manifest(const std::string& text, const std::string& where) {
  const nlohmann::json parsed = parse_json(text, where);
  const JsonObject json(parsed, where);
  const std::string format = json.string("format");
  SAFEGRAD_CHECK(format == kFormat, InputError, "{}: format: got \"{}\", this version reads \"{}\"",
                 where, printable(format), kFormat);
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 2;
  Manifest m;
  m.step = json.integer("step", 0, kMost);
  m.updates = json.integer("updates", 0, m.step);
  if (const nlohmann::json* align = json.find("align")) {
    const JsonObject held(*align, where + ": align");
    const nlohmann::json *loss = held.find("loss"), *aa = held.find("aa");
    if (!loss || !loss->is_number()) held.refuse("loss", "a number");
    // Without in checkpoints from before objective.gate, which alone asks for it.
    if (aa && !aa->is_number()) held.refuse("aa", "a number");
    m.align = {held.integer("tokens", 1, kMost), loss->get<double>(), aa ? aa->get<double>() : 0.0};
  }
  m.ranks = json.integer("ranks", 1, kMaxRanks);
  m.shards = json.integer("shards", 1, m.ranks);
  m.inputs = text_map(json, "inputs");
  m.versions = text_map(json, "versions");
  m.config = text_map(json, "config");
  return m;
}

std::string checkpoint_name(int64_t step) {
  return fmt::format("{}{:06}", kStep, step);
}

std::string shard_name(int64_t index, int64_t shards) {
  return fmt::format("shard-{:05}-of-{:05}.safetensors", index, shards);
}

std::vector<int64_t> list_checkpoints(const std::string& folder) {
  std::vector<int64_t> steps;
  if (!fs::is_directory(folder)) return steps;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (const auto step = step_of(entry.path().filename().string())) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

bool is_unfinished(const std::string& path) {
  const fs::path name = fs::path(path).filename();
  return (step_of(name.stem().string()) || name.stem() == kLatest) &&
         (name.extension() == kUnfinished || name.extension() == kReplaced);
}

void remove_unfinished(const std::string& folder) {
  if (!fs::is_directory(folder)) return;
  on_disk([&] {
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (is_unfinished(entry.path().string())) fs::remove_all(entry.path());
    }
  });
}

std::optional<std::string> find_latest(const std::string& folder,
                                       std::vector<std::string>& warnings) {
  const std::vector<int64_t> steps = list_checkpoints(folder);
  const std::string latest = folder + "/" + kLatest;
  std::string wrong = "is missing";
  if (fs::exists(latest)) {
    std::string name = read_small_file(latest, 4096);
    while (!name.empty() && name.back() == '\n') name.pop_back();
    const auto step = step_of(name);
    if (step && std::binary_search(steps.begin(), steps.end(), *step)) return folder + "/" + name;
    wrong = fmt::format("names \"{}\", which is not there", printable(name));
  } else if (steps.empty()) {
    return {};
  }
  if (steps.empty()) {
    warnings.push_back(fmt::format("{} {}, and there is no complete checkpoint", latest, wrong));
    return {};
  }
  const std::string found = folder + "/" + checkpoint_name(steps.back());
  warnings.push_back(
      fmt::format("{} {}; the newest complete checkpoint is {}", latest, wrong, found));
  return found;
}

Manifest verify_checkpoint(const std::string& folder, int64_t part, int64_t parts) {
  try {
    SAFEGRAD_CHECK(fs::is_directory(folder), InputError, "{}: is no folder", folder);
    const auto sums = read_sums(folder + "/" + kSums);
    verify_file(folder, kManifest, sums);
    const std::string path = folder + "/" + kManifest;
    const Manifest manifest = parse_manifest(read_small_file(path, kMaxManifestBytes), path);
    const auto listed = static_cast<int64_t>(sums.size()) - 1;
    SAFEGRAD_CHECK(listed == manifest.shards, InputError,
                   "{}/{}: is damaged: it has {} files besides the manifest, which says {}", folder,
                   kSums, listed, manifest.shards);
    for (int64_t i = part; i < manifest.shards; i += parts)
      verify_file(folder, shard_name(i, manifest.shards), sums);
    return manifest;
  } catch (const InputError& error) {
    throw InputError(fmt::format("{}; nothing was resumed. What is left: {}", error.what(),
                                 alternative(folder)));
  }
}

// Each of these steps is on the disk before the next begins, so that a crash leaves the folder
// either unfinished, which is never read, or complete; and `latest` on a complete one.
void seal_checkpoint(const std::string& folder, const Manifest& manifest,
                     const std::vector<WrittenShard>& shards) {
  const std::string name = checkpoint_name(manifest.step);
  const std::string target = folder + "/" + name, unfinished = target + std::string(kUnfinished);
  const std::string text = to_json(manifest);
  std::string sums = fmt::format("{}  {}\n", sha256_of(std::as_bytes(std::span(text))), kManifest);
  for (size_t i = 0; i < shards.size(); ++i) {
    const auto rank = static_cast<int64_t>(i);
    const std::string shard = shard_name(rank, static_cast<int64_t>(shards.size()));
    check_visible(unfinished + "/" + shard, rank, shards[i].bytes);
    sums += fmt::format("{}  {}\n", shards[i].digest, shard);
  }
  write_file_atomically(unfinished + "/" + kManifest, text);
  write_file_atomically(unfinished + "/" + kSums, sums);
  on_disk([&] {
    // A run that was resumed further back comes by this step again.
    const std::string replaced = target + std::string(kReplaced);
    if (fs::exists(target)) fs::rename(target, replaced);
    fs::rename(unfinished, target);
    sync_folder_of(target);
    name_latest(folder, manifest.step);
    fs::remove_all(replaced);
  });
}

void name_latest(const std::string& folder, int64_t step) {
  on_disk([&] { write_file_atomically(folder + "/" + kLatest, checkpoint_name(step) + "\n"); });
}

void prune_checkpoints(const std::string& folder, int64_t since, int64_t step,
                       const CheckpointSection& keep) {
  std::vector<int64_t> steps = list_checkpoints(folder), doomed;
  auto left_behind = [&](int64_t s) { return s > since && s != step; };
  std::copy_if(steps.begin(), steps.end(), std::back_inserter(doomed), left_behind);
  std::erase_if(steps, left_behind);
  const auto last = static_cast<size_t>(keep.keep_last);
  for (size_t i = 0; i + last < steps.size(); ++i) {
    if (keep.keep_every == 0 || steps[i] % keep.keep_every != 0) doomed.push_back(steps[i]);
  }
  on_disk([&] {
    for (int64_t old : doomed) {
      // First out of the list of complete ones: the removal of a folder is not atomic.
      const std::string path = folder + "/" + checkpoint_name(old);
      const std::string aside = path + std::string(kReplaced);
      fs::rename(path, aside);
      fs::remove_all(aside);
    }
  });
}

std::vector<std::string> differences(const Manifest& saved, const Manifest& now) {
  auto free = [](const std::string& key) {
    // Of paths the content counts, which `inputs` has.
    for (const char* whole : {"output", "model.path", "model.config", "data.task", "data.align",
                              "batch.max_tokens_per_rank", "train.max_skipped_steps"}) {
      if (key == whole) return true;
    }
    for (const char* section : {"parallel.", "probe[", "checkpoint."}) {
      if (key.compare(0, std::string_view(section).size(), section) == 0) return true;
    }
    return false;
  };
  auto value = [](const auto& map, const std::string& key) {
    const auto found = map.find(key);
    return found == map.end() ? std::string("not given") : found->second;
  };
  // A key that an older program did not know: the run was as its default says.
  std::map<std::string, std::string> was_config = saved.config;
  for (const auto& [key, text] : config_values(RunConfig{})) {
    if (now.config.contains(key)) was_config.emplace(key, text);
  }
  std::map<std::string, std::string> keys = was_config;
  keys.insert(now.config.begin(), now.config.end());
  std::vector<std::string> lines;
  for (const auto& [key, unused] : keys) {
    const std::string was = value(was_config, key), is = value(now.config, key);
    if (was != is && !free(key))
      lines.push_back(fmt::format("{}: was {}, is {}", printable(key), printable(was), is));
  }
  for (const auto& [name, is] : now.inputs) {
    const std::string was = value(saved.inputs, name);
    if (was != is)
      lines.push_back(fmt::format("{}: its fingerprint was {}, is {}", name, printable(was), is));
  }
  return lines;
}

}  // namespace safegrad::dist
