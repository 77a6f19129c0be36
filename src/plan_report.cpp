// plan_report.cpp: plans as text and as JSON.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/words.h"
#include "describe.h"
#include "plan.h"

namespace safegrad {
namespace {

constexpr double kMiB = 1 << 20, kGiB = 1 << 30;

// MiB for what is small.
struct ByteUnit {
  const char* name;
  double bytes;
  double of(int64_t n) const { return static_cast<double>(n) / bytes; }
};
ByteUnit unit_for(int64_t largest) {
  return static_cast<double>(largest) < kGiB ? ByteUnit{"MiB", kMiB} : ByteUnit{"GiB", kGiB};
}

// 1234567 -> "1,234,567".
std::string grouped(int64_t n) {
  return n < 1000 ? fmt::format("{}", n) : fmt::format("{},{:03}", grouped(n / 1000), n % 1000);
}

// With all digits that a person compares.
std::string rate_in_words(double tokens_per_s) {
  return tokens_per_s < 100 ? fmt::format("{:.3g}", tokens_per_s)
                            : grouped(std::llround(tokens_per_s));
}

std::string seconds_in_words(double s) {
  if (s >= 0.1) return fmt::format("{:.2f} s", s);
  return fmt::format("{:.2f} ms", 1e3 * s);
}

std::string title_line(const PlanTitle& t, const dist::RankPlan& p) {
  return fmt::format("{}, {} ({:.4g} M of {:.4g} M trained) · {} · {}\n", t.model, t.training,
                     static_cast<double>(p.trained) / 1e6, static_cast<double>(p.parameters) / 1e6,
                     t.device, t.lengths);
}

struct Row {
  const char* name;
  const char* key;  // in JSON
  int64_t dist::Memory::*part;
};
constexpr Row kRows[] = {{"parameters", "weights", &dist::Memory::weights},
                         {"optimizer", "optimizer", &dist::Memory::optimizer},
                         {"gradients", "gradients", &dist::Memory::gradients},
                         {"buffers", "buffers", &dist::Memory::buffers},
                         {"activations", "activations", &dist::Memory::activations},
                         {"logits", "logits", &dist::Memory::logits},
                         {"reference cache", "reference", &dist::Memory::reference},
                         {"checkpoint's copy", "checkpoint", &dist::Memory::checkpoint}};

const char* fits_in_words(const dist::RankPlan& p) {
  if (p.fits()) return "it fits";
  if (p.memory.peak() > p.device_bytes) return "DOES NOT FIT";
  return p.reference_pass.peak() > p.device_bytes ? "the reference's pass DOES NOT FIT"
                                                  : "a probe DOES NOT FIT";
}

std::string memory_rows(const dist::RankPlan& p) {
  const ByteUnit unit = unit_for(p.memory.peak());
  std::string text = fmt::format("memory a rank, {}    largest   at the peak\n", unit.name);
  for (const Row& row : kRows) {
    text += fmt::format("  {:<18}{:>9.3f}{:>14.3f}\n", row.name,
                        unit.of(p.memory.largest.*row.part), unit.of(p.memory.at_peak.*row.part));
  }
  text +=
      fmt::format("  {:<18}{:>23.3f}   {}\n", "peak", unit.of(p.memory.peak()), p.memory.moment);
  text += fmt::format("  {:<18}{:>23.3f}   {}\n", "there is", unit.of(p.device_bytes),
                      fits_in_words(p));
  if (p.reference_file_bytes > 0) {
    text +=
        fmt::format("  reference's pass before the first step: {}; its files: {}\n",
                    size_in_words(p.reference_pass.peak()), size_in_words(p.reference_file_bytes));
  }
  if (p.probe_pass.peak() > 0)
    text += fmt::format("  likelihood probes: {}\n", size_in_words(p.probe_pass.peak()));
  if (p.host_checkpoint_bytes > 0) {
    text +=
        fmt::format("  host memory of a checkpoint's copy, each rank of the first replica: {}\n",
                    size_in_words(p.host_checkpoint_bytes));
  }
  return text;
}

std::string largest_in_words(const dist::RankPlan& p) {
  return p.largest_micro_batch == 0 ? "none" : grouped(p.largest_micro_batch);
}

std::string step_rows(const dist::RankPlan& p) {
  std::string text = "a step                  calls     sent by a rank       time\n";
  for (const auto& [name, traffic] : p.traffic) {
    text +=
        fmt::format("  {:<18}{:>9}{:>19}{:>11}\n", name, traffic.calls,
                    size_in_words(traffic.bytes), seconds_in_words(p.time.by_collective.at(name)));
  }
  text += fmt::format(
      "  necessary products {:.4g} TFLOP of all ranks\n"
      "  matrix products {}, memory bandwidth {}, network {}\n"
      "  expected {}, {} tokens/s; bottleneck: {}\n",
      p.flops / 1e12, seconds_in_words(p.time.products_s), seconds_in_words(p.time.memory_s),
      seconds_in_words(p.time.network_s), seconds_in_words(p.time.total_s),
      rate_in_words(p.tokens_per_s()), p.time.bottleneck);
  return text;
}

std::string renewal_in_words(const dist::RankPlan& p) {
  if (p.align_every == 1) return "";
  return fmt::format("the alignment gradient is computed in one of {} steps: {}\n",
                     grouped(p.align_every),
                     p.renews ? "this one does, so the others take less time and send less"
                              : "this one does not, so those that do take more time and send more");
}

std::string idle_in_words(const dist::RankPlan& p) {
  if (p.idle_ranks == 0) return "";
  return fmt::format("{} of {} ranks have no sequence in this step: raise batch.task_sequences\n",
                     grouped(p.idle_ranks), grouped(p.ranks));
}

std::string table_row(const dist::RankPlan& p, const ByteUnit& unit) {
  const dist::Memory& m = p.memory.at_peak;
  int64_t sent = 0;
  for (const auto& [name, traffic] : p.traffic) sent += traffic.bytes;
  return fmt::format(
      "{:>7}{:>7}{:>8}{:>9.3f}{:>9.3f}{:>9.3f}{:>9.3f}{:>9.3f}{:>11}{:>13}{:>11}{:>12}  {}\n",
      p.ranks, p.shards, p.idle_ranks, unit.of(p.memory.peak()), unit.of(m.weights),
      unit.of(m.optimizer + m.gradients), unit.of(m.buffers),
      unit.of(m.activations + m.logits + m.reference), largest_in_words(p), size_in_words(sent),
      seconds_in_words(p.time.total_s), rate_in_words(p.tokens_per_s()),
      p.fits() ? p.time.bottleneck : fits_in_words(p));
}

constexpr const char* kColumns =
    "  shards      ranks that hold one copy of weights, gradients and optimizer together\n"
    "  idle        ranks without a sequence in the step\n"
    "  peak        most that the rank holds at a time; the next four are its parts at that moment\n"
    "  weights     parameters\n"
    "  optim       gradients, moments and master weights\n"
    "  buffers     gathered parameters, and gradients on their way to other ranks\n"
    "  activ       activations, logits and the start model's hidden states\n"
    "  fits        the largest micro-batch that fits, in tokens (batch.max_tokens_per_rank is {})\n"
    "  sent        what the rank sends in a step\n"
    "  step        the expected time of a step; docs/plan.md says what is assumed\n"
    "  tokens/s    of all ranks, task and alignment\n"
    "  bottleneck  what takes longest in a step, or what does not fit\n";

const char* name_of(dist::Transport transport) {
  switch (transport) {
    case dist::Transport::shared_memory:
      return "shared memory";
    case dist::Transport::messages:
      return "messages";
    case dist::Transport::nccl:
      return "nccl";
  }
  return "?";
}

nlohmann::ordered_json to_json(const dist::Memory& m) {
  nlohmann::ordered_json json;
  for (const Row& row : kRows) json[row.key] = m.*row.part;
  return json;
}

nlohmann::ordered_json to_json(const std::map<std::string, dist::Traffic>& all) {
  nlohmann::ordered_json json;
  for (const auto& [name, t] : all) json[name] = {{"calls", t.calls}, {"bytes", t.bytes}};
  return json;
}

}  // namespace

std::string memory_in_words(const dist::MemoryEstimate& memory) {
  const ByteUnit unit = unit_for(memory.peak());
  const dist::Memory& m = memory.at_peak;
  auto in_unit = [&](int64_t bytes) { return fmt::format("{:.1f}", unit.of(bytes)); };
  return fmt::format(
      "{} {} planned (weights {}, gradients {}, optimizer {}, activations {}, buffers {}{})",
      in_unit(memory.peak()), unit.name, in_unit(m.weights), in_unit(m.gradients),
      in_unit(m.optimizer), in_unit(m.activations + m.logits + m.reference), in_unit(m.buffers),
      m.checkpoint == 0 ? "" : ", checkpoint " + in_unit(m.checkpoint));
}

std::string plan_in_full(const PlanTitle& title, const dist::RankPlan& p) {
  return title_line(title, p) +
         fmt::format(
             "{} rank{}, {} a machine, {}, {}\nfullest of the first {}: step {}, rank {}: "
             "micro-batches: {}, the largest of {} tokens ({} scored)\n",
             grouped(p.ranks), p.ranks == 1 ? "" : "s",
             grouped(std::min(p.ranks, title.ranks_per_node)), layout_in_words(p.ranks, p.shards),
             name_of(p.transport), counted(p.steps_seen, "step"), p.step + 1, p.rank,
             p.micro_batches, grouped(p.tokens), grouped(p.scored)) +
         renewal_in_words(p) + idle_in_words(p) + memory_rows(p) +
         fmt::format("largest micro-batch that fits: {} tokens (batch.max_tokens_per_rank is {})\n",
                     largest_in_words(p), grouped(title.max_tokens)) +
         step_rows(p);
}

std::string plan_table(const PlanTitle& title, const std::vector<PlanOrReason>& rows) {
  int64_t most = 0;
  const dist::RankPlan* first = nullptr;
  for (const PlanOrReason& row : rows) {
    if (!row.plan) continue;
    if (!first) first = &*row.plan;
    most = std::max(most, row.plan->memory.peak());
  }
  const ByteUnit unit = unit_for(most);
  std::string text = title_line(title, *first);
  text +=
      fmt::format("memory of the fullest rank in {}; {} a machine, {} inside it, {} between\n",
                  unit.name, counted(title.ranks_per_node, "rank"), title.inside, title.between);
  text += fmt::format("{:>7}{:>7}{:>8}{:>9}{:>9}{:>9}{:>9}{:>9}{:>11}{:>13}{:>11}{:>12}  {}\n",
                      "ranks", "shards", "idle", "peak", "weights", "optim", "buffers", "activ",
                      "fits", "sent", "step", "tokens/s", "bottleneck");
  for (const PlanOrReason& row : rows)
    text +=
        row.plan ? table_row(*row.plan, unit) : fmt::format("{:>7}  {}\n", row.ranks, row.reason);
  return text + fmt::format(kColumns, grouped(title.max_tokens));
}

std::string plan_json(int64_t ranks, const std::string& reason) {
  return nlohmann::ordered_json{{"ranks", ranks}, {"error", reason}}.dump();
}

std::string plan_json(const PlanTitle& title, const dist::RankPlan& p, const RankRun* run) {
  nlohmann::ordered_json json;
  json["model"] = title.model;
  json["device"] = title.device;
  json["inside"] = title.inside;
  json["between"] = title.between;
  json["gemm_tflops"] = title.gemm_tflops;
  json["memory_gb_per_s"] = title.memory_gb_per_s;
  json["ranks"] = p.ranks;
  json["shards"] = p.shards;
  json["transport"] = name_of(p.transport);
  json["parameters"] = p.parameters;
  json["trained"] = p.trained;
  json["steps_seen"] = p.steps_seen;
  json["step"] = p.step + 1;
  json["rank"] = p.rank;
  json["micro_batches"] = p.micro_batches;
  json["tokens"] = p.tokens;
  json["scored"] = p.scored;
  json["align_every"] = p.align_every;
  json["renews"] = p.renews;
  json["idle_ranks"] = p.idle_ranks;
  json["task_tokens"] = p.task_tokens;
  json["align_tokens"] = p.align_tokens;
  json["peak_bytes"] = p.memory.peak();
  json["moment"] = p.memory.moment;
  json["at_peak"] = to_json(p.memory.at_peak);
  json["largest"] = to_json(p.memory.largest);
  json["reference_pass_bytes"] = p.reference_pass.peak();
  json["reference_file_bytes"] = p.reference_file_bytes;
  json["probe_pass_bytes"] = p.probe_pass.peak();
  json["host_checkpoint_bytes"] = p.host_checkpoint_bytes;
  json["device_bytes"] = p.device_bytes;
  json["fits"] = p.fits();
  json["largest_micro_batch"] = p.largest_micro_batch;
  json["traffic"] = to_json(p.traffic);
  json["flops"] = p.flops;
  json["products_s"] = p.time.products_s;
  json["memory_s"] = p.time.memory_s;
  json["network_s"] = p.time.network_s;
  json["step_s"] = p.time.total_s;
  json["tokens_per_s"] = p.tokens_per_s();
  json["bottleneck"] = p.time.bottleneck;
  if (run) {
    json["run"] = {{"tensor_bytes", run->tensor_bytes},
                   {"resident_bytes", run->resident_bytes},
                   {"seconds", run->seconds},
                   {"traffic", to_json(run->traffic)}};
  }
  return json.dump();
}

std::string run_in_words(const dist::RankPlan& p, const RankRun& run) {
  const double ratio =
      static_cast<double>(run.tensor_bytes) / static_cast<double>(planned_tensor_bytes(p));
  return fmt::format(
      "run of rank {} of {}, by messages whatever a machine has: tensors held {}, {:+.2f} % off "
      "the "
      "plan; the process has held {} at most; {} a step without its peers\n",
      p.rank, grouped(p.ranks), size_in_words(run.tensor_bytes), 100 * (ratio - 1),
      size_in_words(run.resident_bytes), seconds_in_words(run.seconds));
}

}  // namespace safegrad
