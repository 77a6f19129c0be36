// train.cpp: the train command: a run from its first line to its model.
#include <chrono>
#include <cmath>
#include <filesystem>

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/metrics.h"
#include "core/sha256.h"
#include "core/words.h"
#include "describe.h"
#include "dist/checkpoint.h"
#include "dist/job_failed.h"
#include "dist/local_rank.h"
#include "job.h"
#include "models/hf_export.h"
#include "output_folder.h"
#include "plan.h"
#include "resume.h"
#include "sample_list.h"
#include "step_health.h"
#include "stop_signal.h"
#include "verbose.h"

namespace safegrad {
namespace {

// `near`: ranks of this machine. `reads`: the weights, which may take minutes, are read after it.
void print_header(const Job& job, dist::Mesh& mesh, int near, bool reads) {
  fmt::print("{}{}", header_in_words(job, mesh.world().size(), mesh.shards(), near),
             reads ? reading_in_words(job) : "");
  std::fflush(stdout);
}

// "step 3", "steps 7 to 8".
std::string range_in_words(int64_t first, int64_t last) {
  return first == last ? fmt::format("step {}", last) : fmt::format("steps {} to {}", first, last);
}

std::string align_label(const RunConfig& config) {
  return config.objective.align_loss == AlignLoss::kl ? "kl" : "sft";
}

std::string version_comments(const dist::ControlPlane& world, const Backend& backend) {
  return fmt::format("# safegrad {}, LibTorch {}, {}, {} a rank, {}\n", SAFEGRAD_VERSION,
                     SAFEGRAD_LIBTORCH_VERSION, counted(world.size(), "rank"),
                     counted(at::get_num_threads(), "thread"), backend.name());
}

/// A loss in the first and the last step that measured it.
struct LossEnds {
  std::optional<double> first, last;
  void add(const std::optional<double>& loss) {
    if (!loss || std::isnan(*loss)) return;
    if (!first) first = loss;
    last = loss;
  }
  std::string text(const std::string& name) const {
    return first ? fmt::format(" · {} {} → {}", name, format_loss(*first), format_loss(*last)) : "";
  }
};

struct Summary {
  LossEnds task, align;
  StepRecord last;
  int64_t steps = 0, compared = 0, conflicts = 0, skipped = 0, gated = 0;
  double seconds = 0;

  void add(const StepRecord& record) {
    ++steps;
    task.add(record.loss_task);
    align.add(record.loss_align);
    compared += record.ua.has_value();
    last = record;
    conflicts += record.conflict;
    skipped += record.skipped;
    gated += record.gated.value_or(0);
    seconds += record.seconds;
  }
};

// The last word is "done".
void print_summary(const Summary& s, const Job& job) {
  if (s.steps == 0) {
    fmt::print("no step was left · model in {}/model\n", job.config.output);
    return;
  }
  std::string align = s.align.text(align_label(job.config));
  if (s.compared > 0)
    align += fmt::format(" · conflicts in {} of {}", s.conflicts, counted(s.compared, "step"));
  if (s.gated > 0) align += fmt::format(" · {} left out by the gate", counted(s.gated, "draw"));
  if (s.skipped > 0) align += fmt::format(" · {} skipped (not finite)", counted(s.skipped, "step"));
  for (const auto& [name, measures] : s.last.probe)
    fmt::print("probe {}:{}\n", name, measures_in_words(measures));
  const int64_t first = s.last.step - s.steps + 1;
  const std::string part =
      first > 1 ? fmt::format(" ({})", range_in_words(first, s.last.step)) : std::string();
  fmt::print("done in {}{}{}{} · model in {}/model\n", format_duration(s.seconds), part,
             s.task.text("task"), align, job.config.output);
}

std::string gate_path(const RunConfig& config) {
  return config.output + "/gate.jsonl";
}

// The task samples as the gate has scored them last, the worst first, those without a score last.
void write_gate(const Job& job, const dist::Gate& gate) {
  const std::vector<double>& scores = gate.scores();
  auto found = [&, limit = gate.threshold()](int64_t i) {
    const double score = scores[static_cast<size_t>(i)];
    return nlohmann::ordered_json{{"score", score}, {"dropped", score < limit}};
  };
  write_file_atomically(gate_path(job.config),
                        sample_lines(*job.data.task, by_score(scores, HUGE_VAL), found));
}

std::unique_ptr<models::HfExport> make_export(const Job& job) {
  const RunConfig& c = job.config;
  const bool adapter = c.model.lora && !c.model.lora->merge;
  return std::make_unique<models::HfExport>(
      models::ExportTarget{c.output + "/model", job.model.base_folder, c.model.config,
                           c.model.dtype, adapter ? c.model.lora : std::nullopt});
}

constexpr const char* kWeights = "model weights";

std::string checkpoint_folder(const RunConfig& config) {
  return config.output + "/checkpoints";
}

std::string metrics_path(const RunConfig& config) {
  return config.output + "/metrics.jsonl";
}

// What a checkpoint of this run says about it. The weights' fingerprint follows when they are read.
dist::Manifest describe_run(const Job& job) {
  dist::Manifest facts;
  facts.config = config_values(job.config);
  facts.versions = {{"safegrad", SAFEGRAD_VERSION}, {"LibTorch", SAFEGRAD_LIBTORCH_VERSION}};
  const std::string& base = job.model.base_folder;
  facts.inputs["model config.json"] =
      sha256_of_file(base.empty() ? job.config.model.config : base + "/config.json");
  auto add = [&](const char* name, const TokenFile& file) {
    facts.inputs[name] = fmt::format("{:016x}", file.fingerprint());
  };
  add("data.task content", *job.data.task);
  if (job.data.align) add("data.align content", *job.data.align);
  return facts;
}

// What can only be compared once the weights are read.
void check_weights(const StartPoint& start, const dist::Trainer& trainer, bool allow_change,
                   std::vector<std::string>& warnings) {
  dist::Manifest now;
  now.config = start.saved.config;  // is compared already
  now.inputs[kWeights] = fmt::format("{:016x}", trainer.start_fingerprint());
  check_unchanged(start, now, allow_change, warnings);
}

// The run's files as they are when its first step begins; what rank 0 writes steps to.
std::unique_ptr<MetricsFile> begin_files(const Job& job, const StartPoint& start,
                                         dist::Mesh& mesh) {
  std::unique_ptr<MetricsFile> metrics;
  dist::agree(mesh.world(), [&] {
    if (mesh.world().rank() != 0) return;
    const std::string path = metrics_path(job.config);
    if (start.is_in(checkpoint_folder(job.config))) {
      // First: should this run end before its first checkpoint, `auto` comes here again.
      dist::name_latest(checkpoint_folder(job.config), start.saved.step);
      cut_metrics(path, start.saved.step);
    } else {  // lines that are there are another run's
      std::filesystem::remove(path);
      std::filesystem::remove(gate_path(job.config));
    }
    write_file_atomically(
        job.config.output + "/config.yaml",
        version_comments(mesh.world(), job.device->backend()) + to_yaml(job.config));
    metrics = std::make_unique<MetricsFile>(path);
  });
  return metrics;
}

// `recorded`: the last step in the metrics of the run before.
void print_start(const Job& job, const CommandLine& line, const StartPoint& start, int64_t recorded,
                 int64_t total) {
  if (start.resumes()) {
    std::string again;
    if (recorded > start.saved.step) {
      again = fmt::format("; done again: {}{}", range_in_words(start.saved.step + 1, recorded),
                          recorded == total ? ", the run had been through all of its steps" : "");
    }
    fmt::print("resumes after step {} from {}{}\n", start.saved.step, start.folder, again);
  } else if (!line.resume.empty()) {
    fmt::print("no checkpoint in {}: starts at the beginning\n", checkpoint_folder(job.config));
  }
  std::fflush(stdout);
}

// Starts a checkpoint; the time that training stands still for it.
double begin_checkpoint(dist::CheckpointWriter& checkpoints, int64_t step, bool keep_one_more) {
  const auto begin = std::chrono::steady_clock::now();
  checkpoints.start(step, keep_one_more);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Runs what is left after `start`; true if it was asked to stop before the last step. Where too
// many steps in a row were skipped, JobFailed.
bool run_steps(const Job& job, const StartPoint& start, dist::Trainer& trainer,
               dist::CheckpointWriter& checkpoints, MetricsFile* metrics, bool talks,
               Summary& summary) {
  const int64_t every = job.config.checkpoint.every_steps, total = trainer.total_steps();
  ProgressLine progress(stdout, total, align_label(job.config));
  StepHealth health(job.config,
                    metrics ? read_losses(metrics_path(job.config)) : std::vector<double>());
  int64_t finished = start.saved.step;
  bool stop = false, due = false;
  std::string saved = start.folder;  // the newest checkpoint, after so many updates
  int64_t saved_updates = trainer.updates();
  while (finished < total && !stop && !health.gives_up()) {
    StepRecord record = trainer.step(finished, {stop_requested(), checkpoints.writing()});
    const std::string warning = health.look(record, [&] { return trainer.task_samples(); });
    ++finished;
    // A copy: all of what follows branches on what the ranks agreed on in this step.
    const dist::Notice notice = trainer.notice();
    stop = notice.stop && finished < total;
    record.probe = trainer.run_probes(finished);
    if (checkpoints.open() && !notice.writing) checkpoints.advance();
    due = due || (every > 0 && finished % every == 0);
    // Skipped steps leave the state as it was: while it may be the state that is wrong, no new copy
    // of it takes the place of an older one.
    const bool last = every > 0 && health.gives_up() && trainer.updates() != saved_updates;
    if (stop || last || (due && !record.skipped)) {
      record.checkpoint_seconds = begin_checkpoint(checkpoints, finished, record.skipped);
      due = false;
      saved_updates = trainer.updates();
      saved = checkpoint_folder(job.config) + "/" + dist::checkpoint_name(finished);
    }
    summary.add(record);
    if (metrics)
      metrics->write(record);  // a full disk ends the job through main: no collective for it
    if (talks) progress.show(record);
    if (talks && !warning.empty()) {
      progress.finish();
      fmt::print(stderr, "warning: {}\n", warning);
    }
  }
  checkpoints.finish();
  if (talks) progress.finish();
  if (health.gives_up()) {
    if (trainer.updates() != saved_updates) saved.clear();
    throw dist::JobFailed(metrics ? health.report(saved) : "", 2);
  }
  if (stop && talks) {
    fmt::print("stopped on request after step {}; run again with --resume auto to continue\n",
               finished);
    std::fflush(stdout);  // the launcher may end this process as soon as another one has ended
  }
  return stop;
}

}  // namespace

int train(const CommandLine& line, dist::Launcher& launcher) {
  catch_stop_signals();
  PartTimes times;
  Job job = open_job(line, launcher, Purpose::train);
  const bool speaks = launcher.control().rank() == 0;
  const bool talks = speaks && !line.quiet;
  times.end("opening");
  dist::Mesh mesh(job.device->connect(), job.config.parallel.shards);
  dist::Manifest facts = describe_run(job);
  OutputFolder output(job.config.output);  // rank 0's, until the run ends
  dist::agree(launcher.control(), [&] {
    if (speaks) output.claim(job.warnings);
  });
  const StartPoint start =
      find_start(line.resume, job.config.output, launcher.control(), job.warnings);
  dist::agree(mesh.world(), [&] {
    if (start.resumes()) check_unchanged(start, facts, line.allow_change, job.warnings);
    if (speaks && !start.resumes() && !line.resume.empty() &&
        std::filesystem::exists(metrics_path(job.config))) {
      job.warnings.push_back(fmt::format(
          "--resume {}: there is no checkpoint, but {}: its steps are done again and replaced",
          line.resume, metrics_path(job.config)));
    }
    if (speaks) output.make(job.warnings);
  });
  print_warnings(job.warnings, line, launcher.control());
  times.end("connecting and output folder");

  const int near = dist::find_local_rank(launcher.control()).ranks;
  // A checkpoint may be refused for the weights that it was written with.
  if (talks && !start.resumes()) print_header(job, mesh, near, /*reads=*/true);
  dist::Trainer trainer(job.config, *job.model.decoder, *job.model.weights, job.data, mesh);
  facts.inputs[kWeights] = fmt::format("{:016x}", trainer.start_fingerprint());
  facts.step = start.saved.step;
  times.end("weights and reference");
  if (start.resumes()) {
    std::vector<std::string> warnings;
    dist::agree(mesh.world(), [&] { check_weights(start, trainer, line.allow_change, warnings); });
    print_warnings(warnings, line, launcher.control());
    if (talks) print_header(job, mesh, near, /*reads=*/false);
    dist::restore_checkpoint(trainer, mesh, start.folder, start.saved);
    times.end("checkpoint");
  }
  const bool goes_on = talks && start.is_in(checkpoint_folder(job.config));
  const int64_t recorded = goes_on ? last_recorded_step(metrics_path(job.config)) : 0;
  const auto metrics = begin_files(job, start, mesh);
  dist::CheckpointWriter checkpoints(trainer, mesh, checkpoint_folder(job.config),
                                     job.config.checkpoint, facts, launcher.watchdog().files(),
                                     [&metrics] {
                                       if (metrics) metrics->sync();
                                     });
  trainer.measure_speed_of_light();
  const std::string ranks = ranks_in_full(launcher.control(), job.device->backend());
  times.end("measuring the speed of light");
  if (talks) {
    fmt::print("speed of light: necessary matrix products at {:.0f} GFLOP/s of all ranks\n",
               trainer.gemm_rate() / 1e9);
  }
  if (talks && line.verbose) fmt::print("{}{}{}", ranks, files_in_full(job), times.text());
  if (talks) print_start(job, line, start, recorded, trainer.total_steps());

  Summary summary;
  const bool stopped = run_steps(job, start, trainer, checkpoints, metrics.get(), talks, summary);
  // One rank's code is enough; launchers take one that is not 0 as a reason to kill the others.
  if (stopped) return speaks ? kStoppedOnRequest : 0;
  const auto sink = speaks ? make_export(job) : nullptr;
  trainer.export_model(job.config.model.lora && job.config.model.lora->merge, sink.get());
  dist::agree(mesh.world(), [&] {
    if (speaks && trainer.gate()) write_gate(job, *trainer.gate());
  });
  if (talks) print_summary(summary, job);
  return 0;
}

}  // namespace safegrad
