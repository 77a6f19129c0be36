#include "core/metrics.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "core/error.h"
#include "core/files.h"

namespace safegrad {

namespace {

nlohmann::ordered_json to_json(const NotFinite& what) {
  nlohmann::ordered_json json;
  json["losses"] = what.losses;
  json["blocks"] = nlohmann::ordered_json::object();
  for (const auto& [block, objectives] : what.blocks) json["blocks"][block] = objectives;
  json["samples"] = what.samples;
  return json;
}

}  // namespace

std::string to_json_line(const StepRecord& record) {
  nlohmann::ordered_json json;
  const auto put = [&json](const char* key, const auto& value) { json[key] = value; };
  const auto put_if = [&json](const char* key, const auto& value) {
    if (value) json[key] = *value;
  };
  const auto put_map = [&json](const char* key, const auto& map) {
    if (!map.empty()) json[key] = map;
  };

  put("step", record.step);
  put("epoch", record.epoch);
  put("loss_task", record.loss_task);
  put_if("loss_align", record.loss_align);
  if (record.align_renewed) put("align_renewed", *record.align_renewed);
  put_if("gated", record.gated);
  put("uu", record.uu);
  put_if("ua", record.ua);
  put_if("aa", record.aa);
  put_if("cosine", record.cosine);
  put("conflict", record.conflict);
  put("c_task", record.c_task);
  put_if("c_align", record.c_align);
  put_if("drift", record.drift);
  put_if("c_drift", record.c_drift);
  if (record.block_coefficients) {
    const BlockCoefficients& c = *record.block_coefficients;
    json["block_coefficients"] = {
        {"c_task", c.task}, {"c_align", c.align}, {"conflicts", c.conflicts}};
  }
  put("grad_norm", record.grad_norm);
  put("clip", record.clip);
  put("lr", record.lr);
  put("task_tokens", record.task_tokens);
  put("align_tokens", record.align_tokens);
  put("seconds", record.seconds);
  put("tokens_per_s", record.tokens_per_s);
  put("flops", record.flops);
  put("speed_of_light", record.speed_of_light);
  put_if("memory_bytes", record.memory_bytes);
  put_if("checkpoint_seconds", record.checkpoint_seconds);
  put("skipped", record.skipped);
  if (record.not_finite) json["not_finite"] = to_json(*record.not_finite);
  if (record.loss_spike) {
    const LossSpike& spike = *record.loss_spike;
    json["loss_spike"] = {
        {"median", spike.median}, {"limit", spike.limit}, {"samples", spike.samples}};
  }
  put_map("probe", record.probe);
  put_map("phase_seconds", record.phase_seconds);
  put_map("blocks", record.blocks);
  // Names come from token files: replacing bad UTF-8 is better than losing the line.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

namespace {

/// True if the file has a last line without its newline.
bool ends_inside_a_line(const std::string& path) {
  std::error_code ignored;  // opening the file reports what is wrong
  if (!std::filesystem::is_regular_file(path, ignored)) return false;
  std::ifstream stream(path, std::ios::binary);
  if (!stream.seekg(-1, std::ios::end)) return false;  // empty
  return stream.get() != '\n';
}

}  // namespace

MetricsFile::MetricsFile(const std::string& path) : path_(path) {
  const bool cut_short = ends_inside_a_line(path);
  stream_.reset(std::fopen(path.c_str(), "abe"));
  SAFEGRAD_CHECK(stream_, RunError, "{}: cannot be opened for writing: {}", path,
                 std::strerror(errno));
  sync_folder_of(path);  // it may be new
  if (cut_short) append("\n");
}

void MetricsFile::write(const StepRecord& record) {
  append(to_json_line(record) + "\n");
}

void MetricsFile::sync() const {
  SAFEGRAD_CHECK(::fsync(::fileno(stream_.get())) == 0, RunError, "{}: cannot be synced: {}", path_,
                 std::strerror(errno));
}

void MetricsFile::append(const std::string& text) {
  const bool written = std::fwrite(text.data(), 1, text.size(), stream_.get()) == text.size() &&
                       std::fflush(stream_.get()) == 0;
  SAFEGRAD_CHECK(written, RunError, "{}: cannot be written: {}; make room and run again to resume",
                 path_, std::strerror(errno));
}

}  // namespace safegrad
