// audit.cpp: the audit command: the task samples, the ones that work against alignment first.
#include "dist/audit.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "core/files.h"
#include "core/json.h"
#include "core/metrics.h"
#include "job.h"

namespace safegrad {
namespace {

// Sample indices, the lowest score first; before all others those whose score is no number.
std::vector<int64_t> rank_samples(const dist::Audit& audit) {
  std::vector<int64_t> order(audit.samples.size());
  std::iota(order.begin(), order.end(), 0);
  auto key = [&](int64_t i) {
    const double score = audit.samples[static_cast<size_t>(i)].score;
    return std::isfinite(score) ? score : -HUGE_VAL;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return key(a) < key(b); });
  return order;
}

std::string source_of(const TokenFile& task, int64_t i) {
  return task.sources()[static_cast<size_t>(task.source(i))];
}

// A line of JSON a sample, in the order of `order`; NaN and infinities become null.
std::string to_json_lines(const dist::Audit& audit, const TokenFile& task,
                          const std::vector<int64_t>& order) {
  std::string lines;
  for (int64_t i : order) {
    const dist::AuditedSample& sample = audit.samples[static_cast<size_t>(i)];
    nlohmann::ordered_json json = {{"index", i},
                                   {"score", sample.score},
                                   {"loss", sample.loss},
                                   {"tokens", task.length(i)},
                                   {"scored", task.scored(i)}};
    if (task.has_sources()) json["source"] = source_of(task, i);
    lines += json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  }
  return lines;
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

void print_summary(const dist::Audit& audit, const TokenFile& task, double seconds,
                   const std::string& path) {
  int64_t below = 0, broken = 0, tokens = 0;
  for (const dist::AuditedSample& sample : audit.samples) {
    below += sample.score < 0;
    broken += !std::isfinite(sample.score);
  }
  tokens = task.total_tokens();
  fmt::print(
      "{} samples, {} tokens in {} ({:.0f} tok/s) · alignment loss {:.3f}, |a| {:.3g} · {} "
      "below zero{} · all in {}\n",
      audit.samples.size(), tokens, format_duration(seconds), static_cast<double>(tokens) / seconds,
      audit.align_loss, audit.align_norm, below,
      broken > 0 ? fmt::format(" · {} NOT FINITE", broken) : "", path);
}

// On a terminal: one line, redrawn; `what` counts.
void show_progress(bool talks, const char* what, int64_t done, int64_t all) {
  if (!talks || !isatty(STDOUT_FILENO)) return;
  fmt::print("\r\033[K{} {}/{}", what, done + 1, all);
  std::fflush(stdout);
}

void end_progress(bool talks) {
  if (talks && isatty(STDOUT_FILENO)) fmt::print("\r\033[K");
}

}  // namespace

int audit(const CommandLine& line, dist::Launcher& launcher) {
  Job job = open_job(line, launcher, Purpose::audit);
  print_warnings(job.warnings, line, launcher.control());
  const bool speaks = launcher.control().rank() == 0;
  dist::Mesh mesh(job.device->connect(), job.config.parallel.shards);
  dist::Trainer trainer(job.config, *job.model.decoder, *job.model.weights, job.data, mesh);
  const auto start = std::chrono::steady_clock::now();
  const bool talks = speaks && !line.quiet;
  for (int64_t step = 0; step < std::min(line.steps, trainer.total_steps()); ++step) {
    show_progress(talks, "plain fine-tuning, step", step, line.steps);
    trainer.step(step);
  }
  const dist::Audit found =
      dist::audit(trainer.engine(), mesh, trainer.objective(0), trainer.objective(1), 1,
                  job.config.batch.max_tokens_per_rank, [&](int64_t done, int64_t all) {
                    show_progress(talks, "gradients, micro-batch", done, all);
                  });
  end_progress(talks);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  dist::agree(mesh.world(), [&] {
    if (!speaks) return;
    const std::vector<int64_t> order = rank_samples(found);
    const std::string path = job.config.output + "/audit.jsonl";
    make_folders(job.config.output);
    write_file_atomically(path, to_json_lines(found, *job.data.task, order));
    if (line.quiet) return;
    print_worst(found, *job.data.task, order, line.top);
    print_summary(found, *job.data.task, seconds.count(), path);
  });
  return 0;
}

}  // namespace safegrad
