#include "step_health.h"

#include <cmath>
#include <fstream>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

namespace safegrad {

StepHealth::StepHealth(const RunConfig& config, const std::vector<double>& losses_before)
    : config_(config) {
  for (const double loss : losses_before) rule_.add(loss);
}

std::string StepHealth::look(StepRecord& record,
                             const std::function<std::vector<int64_t>()>& draws) {
  last_step_ = record.step;
  if (record.not_finite) {
    if (in_a_row_++ == 0) what_ = {};
    what_.merge(*record.not_finite);
    return fmt::format("step {} is skipped, not finite: {}", record.step,
                       to_text(*record.not_finite));
  }
  in_a_row_ = 0;
  if (!std::isfinite(record.loss_task)) return "";  // the step ran no task sequence
  record.loss_spike = rule_.add(record.loss_task);
  if (!record.loss_spike) return "";
  record.loss_spike->samples = draws();
  return fmt::format(
      "step {}: the task loss of {:.4g} stands out from the last ones (median {:.4g}); its samples "
      "are in metrics.jsonl",
      record.step, record.loss_task, record.loss_spike->median);
}

std::string StepHealth::report(const std::string& saved) const {
  const int64_t first = last_step_ - in_a_row_ + 1;
  std::vector<std::string> remedies;
  remedies.push_back("a lower optimizer.lr, or schedule.warmup_steps, from before the loss grew");
  if (config_.optimizer.clip_norm == 0) remedies.push_back("optimizer.clip_norm: 1");
  if (config_.model.dtype == ComputeDtype::bfloat16)
    remedies.push_back("model.dtype: float32, if that is finite bfloat16 is too coarse here");
  if (config_.parallel.reduce_dtype == ComputeDtype::bfloat16)
    remedies.push_back("parallel.reduce_dtype: float32");
  remedies.push_back("other samples (not_finite lists those of each step) or undamaged weights");
  const std::string state = first == 1
                                ? "No step was ever finite: the weights are those it started with"
                                : fmt::format("The weights are those after step {}", first - 1);
  // `auto` takes what was just saved, whose weights may be what is wrong, and refuses a change.
  const std::string how =
      saved.empty() ? ""
                    : ". To go on with any of it: --resume FOLDER --allow-change, FOLDER a "
                      "checkpoint older than that one, which is what auto takes";
  return fmt::format(
      "{}/metrics.jsonl: steps {} to {} were not finite and were skipped, {} in a row "
      "(train.max_skipped_steps): {}. {}{}. What may help: {}{}",
      config_.output, first, last_step_, in_a_row_, to_text(what_), state,
      saved.empty() ? ", and are not saved" : ", saved in " + saved, fmt::join(remedies, "; "),
      how);
}

std::vector<double> read_losses(const std::string& metrics) {
  std::vector<double> losses;
  std::ifstream lines(metrics, std::ios::binary);
  for (std::string line; std::getline(lines, line);) {
    const auto json = nlohmann::json::parse(line, nullptr, false);
    if (!json.is_object() || !json.contains("skipped") || json["skipped"] != false) continue;
    const auto loss = json.find("loss_task");
    if (loss != json.end() && loss->is_number()) losses.push_back(loss->get<double>());
  }
  constexpr size_t kMost = LossSpikeRule::kWindow;
  if (losses.size() > kMost)
    losses.erase(losses.begin(), losses.end() - static_cast<std::ptrdiff_t>(kMost));
  return losses;
}

}  // namespace safegrad
