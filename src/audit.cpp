// audit.cpp: the audit command: the task samples, the ones that work against alignment first.
#include "dist/audit.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/files.h"
#include "core/json.h"
#include "core/metrics.h"
#include "core/terminal.h"
#include "core/words.h"
#include "job.h"
#include "output_folder.h"
#include "sample_list.h"

namespace safegrad {
namespace {

// Before all others those whose score is no number.
std::vector<int64_t> rank_samples(const dist::Audit& audit) {
  std::vector<double> scores;
  for (const dist::AuditedSample& sample : audit.samples) scores.push_back(sample.score);
  return by_score(scores, -HUGE_VAL);
}

void print_worst(const dist::Audit& audit, const TokenFile& task, const std::vector<int64_t>& order,
                 int64_t top) {
  fmt::print("{:>6} {:>8} {:>11} {:>8} {:>7}  {}\n", "rank", "sample", "score", "loss", "tokens",
             task.has_sources() ? "source" : "");
  for (size_t r = 0; r < std::min(order.size(), static_cast<size_t>(top)); ++r) {
    const int64_t i = order[r];
    const dist::AuditedSample& sample = audit.samples[static_cast<size_t>(i)];
    fmt::print("{:>6} {:>8} {:>11.4g} {:>8.3f} {:>7}  {}\n", r + 1, i, sample.score, sample.loss,
               task.length(i), task.has_sources() ? printable(source_of(task, i), 40) : "");
  }
}

void print_summary(const dist::Audit& audit, const TokenFile& task, int64_t steps, double seconds,
                   const std::string& path) {
  int64_t below = 0, broken = 0;
  for (const dist::AuditedSample& sample : audit.samples) {
    below += sample.score < 0;
    broken += !std::isfinite(sample.score);
  }
  const std::string not_finite = broken > 0 ? fmt::format(" · {} NOT FINITE", broken) : "";
  fmt::print(
      "{}, {} tokens, scored after {}; {} in all · alignment loss {}, |a| {:.3g} · {} below zero, "
      "which is no border between good and bad{} · all in {}\n",
      counted(static_cast<int64_t>(audit.samples.size()), "sample"), task.total_tokens(),
      counted(steps, "plain step"), format_duration(seconds), format_loss(audit.align_loss),
      audit.align_norm, below, not_finite, path);
}

// On a terminal one line, redrawn; in a log a line twice a minute.
class Progress {
 public:
  explicit Progress(bool talks) : talks_(talks), redraws_(talks && is_terminal(stdout)) {}

  void show(const char* what, int64_t done, int64_t all) {
    if (!talks_) return;
    const auto now = std::chrono::steady_clock::now();
    if (!redraws_ && now - last_ < std::chrono::seconds(30)) return;
    last_ = now;
    fmt::print("{}{} {}/{}{}", redraws_ ? "\r\033[K" : "", what, done + 1, all,
               redraws_ ? "" : "\n");
    std::fflush(stdout);
  }

  void end() const {
    if (redraws_) fmt::print("\r\033[K");
  }

 private:
  bool talks_, redraws_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// A skipped step would leave the samples scored at another point than the one that was asked for.
void take_step(dist::Trainer& trainer, dist::Mesh& mesh, int64_t step) {
  const StepRecord record = trainer.step(step);
  dist::agree(mesh.world(), [&] {
    SAFEGRAD_CHECK(!record.skipped, RunError,
                   "audit: plain step {} is not finite: {}; take fewer --steps, or a lower "
                   "optimizer.lr",
                   step + 1, to_text(*record.not_finite));
  });
}

}  // namespace

int audit(const CommandLine& line, dist::Launcher& launcher) {
  Job job = open_job(line, launcher, Purpose::audit);
  print_warnings(job.warnings, line, launcher.control());
  const bool speaks = launcher.control().rank() == 0;
  dist::Mesh mesh(job.device->connect(), job.config.parallel.shards);
  OutputFolder output(job.config.output);  // rank 0's, until the audit ends
  dist::agree(launcher.control(), [&] {
    if (!speaks) return;
    output.claim(job.warnings);
    output.make(job.warnings);
  });
  dist::Trainer trainer(job.config, *job.model.decoder, *job.model.weights, job.data, mesh);
  const auto start = std::chrono::steady_clock::now();
  Progress progress(speaks && !line.quiet);
  const int64_t steps = std::min(line.steps, trainer.total_steps());
  for (int64_t step = 0; step < steps; ++step) {
    progress.show("plain fine-tuning, step", step, steps);
    take_step(trainer, mesh, step);
  }
  const dist::Audit found = dist::audit(
      trainer.engine(), mesh, trainer.objective(0), trainer.objective(1), 1,
      job.config.batch.max_tokens_per_rank,
      [&](int64_t done, int64_t all) { progress.show("gradients, micro-batch", done, all); });
  progress.end();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  dist::agree(mesh.world(), [&] {
    if (!speaks) return;
    const std::vector<int64_t> order = rank_samples(found);
    const std::string path = job.config.output + "/audit.jsonl";
    write_file_atomically(
        path, sample_lines(*job.data.task, order, [&](int64_t i) {
          const dist::AuditedSample& sample = found.samples[static_cast<size_t>(i)];
          return nlohmann::ordered_json{{"score", sample.score}, {"loss", sample.loss}};
        }));
    if (line.quiet) return;
    print_worst(found, *job.data.task, order, line.top);
    print_summary(found, *job.data.task, steps, seconds.count(), path);
  });
  return 0;
}

}  // namespace safegrad
