#include "commands.h"

#include <filesystem>
#include <system_error>

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "core/config.h"
#include "core/error.h"
#include "core/files.h"
#include "core/metrics.h"
#include "core/pack.h"
#include "cpu/cpu_backend.h"
#include "device.h"
#include "dist/mesh.h"
#include "dist/trainer.h"
#include "models/hf_export.h"
#include "models/open_model.h"

namespace safegrad {
namespace {

/// Everything a command needs, opened and checked on every rank.
struct Job {
  RunConfig config;
  std::unique_ptr<RunDevice> device;  // null for check of a config that names a GPU
  models::OpenedModel model;
  dist::RunData data;
  std::vector<std::string> warnings;
};

enum class Purpose { train, check, evaluate };

void check_supported(const RunConfig& config) {
  SAFEGRAD_CHECK(config.checkpoint.every_steps == 0, ConfigError,
                 "checkpoint.every_steps: this version does not write checkpoints; set it to 0 or "
                 "leave it out");
}

void check_data_given(const RunConfig& config, Purpose purpose) {
  if (purpose != Purpose::evaluate) {
    SAFEGRAD_CHECK(!config.data.task.empty(), ConfigError,
                   "data.task is missing: train needs a token file");
  } else {
    SAFEGRAD_CHECK(!config.probe.empty(), ConfigError,
                   "probe is missing: evaluate needs at least one token file");
  }
}

// The folder that would be written must be writable; it is made only when training starts.
void check_output(const std::string& output) {
  namespace fs = std::filesystem;
  fs::path existing = fs::absolute(output);
  while (!fs::exists(existing)) existing = existing.parent_path();
  SAFEGRAD_CHECK(fs::is_directory(existing), InputError,
                 "output: {} is in the way of {}: it is not a folder", existing.string(), output);
  SAFEGRAD_CHECK(access(existing.c_str(), W_OK | X_OK) == 0, InputError,
                 "output: {} cannot be written; choose another folder with --set output=FOLDER",
                 existing.string());
}

// What is written must not take the place of what was read, and must be what was trained.
void check_export(const RunConfig& config, const models::OpenedModel& model) {
  namespace fs = std::filesystem;
  for (const std::string& source : {config.model.path, model.base_folder}) {
    for (const std::string& target : {config.output, config.output + "/model"}) {
      SAFEGRAD_CHECK(source.empty() || fs::weakly_canonical(source) != fs::weakly_canonical(target),
                     ConfigError,
                     "output: {} would be written to, and training starts from it; choose another "
                     "folder",
                     target);
    }
  }
  SAFEGRAD_CHECK(!model.from_adapter || !config.model.lora || config.model.lora->merge, ConfigError,
                 "model.path: {} is a PEFT adapter; a new adapter would be written for its base "
                 "model, without it; set model.lora.merge to true",
                 config.model.path);
}

// A sequence that fits in no micro-batch would stop the run only after its folder has been begun.
void check_lengths(const RunConfig& config, const dist::RunData& data) {
  const int64_t most = config.batch.max_tokens_per_rank;
  auto check_length = [&](const TokenFile& file, const char* what, int64_t i, int64_t length) {
    SAFEGRAD_CHECK(length <= most, ConfigError,
                   "batch.max_tokens_per_rank: got {}, but {} {} of {} has {} tokens; raise it, or "
                   "prepare the file "
                   "with a smaller --max-length",
                   most, what, i, file.path(), length);
  };
  auto check_file = [&](const TokenFile& file) {
    for (int64_t i = 0; i < file.size(); ++i) check_length(file, "sequence", i, file.length(i));
    if (!file.has_choices()) return;
    const auto lengths = group_lengths(file);
    for (size_t g = 0; g < lengths.size(); ++g) {
      check_length(file, "choice group", static_cast<int64_t>(g), lengths[g]);
    }
  };
  if (data.task) check_file(*data.task);
  if (data.align) check_file(*data.align);
  for (const auto& probe : data.probes) check_file(*probe);
}

// Mistakes in the config name its file.
template <typename Body>
void in_file(const std::string& file, const Body& body) {
  try {
    body();
  } catch (const ConfigError& e) {
    throw ConfigError(fmt::format("{}: {}", file, e.what()));
  }
}

// `check` reads headers alone, and does so on the host for a GPU's config: it runs where no GPU is.
const Backend& open_device(Job& job, dist::Launcher& launcher, Purpose purpose) {
  const ParallelSection& parallel = job.config.parallel;
  if (purpose == Purpose::check && parallel.device == Device::cuda) return cpu_backend();
  job.device = std::make_unique<RunDevice>(parallel, launcher, job.warnings);
  return job.device->backend();
}

Job open_job(const CommandLine& line, dist::Launcher& launcher, Purpose purpose) {
  Job job;
  dist::ControlPlane& control = launcher.control();
  dist::agree(control, [&] {
    job.config = load_config(line.config, line.overrides);
    in_file(line.config, [&] {
      check_supported(job.config);
      check_data_given(job.config, purpose);
    });
  });
  const Backend& backend = open_device(job, launcher, purpose);
  dist::agree(control, [&] {
    in_file(line.config, [&] {
      job.model = models::open_model(job.config.model, job.config.train.seed, backend);
    });
    dist::Mesh::check(control.size(), job.config.parallel.shards);
    if (purpose == Purpose::evaluate) {
      job.config.data = {};
      job.config.batch.align_sequences = 0;
    }
    job.data =
        dist::open_data(job.config, *job.model.decoder, job.model.tokenizer_sha256, job.warnings);
    in_file(line.config, [&] { check_lengths(job.config, job.data); });
    if (purpose == Purpose::evaluate) return;
    check_output(job.config.output);
    in_file(line.config, [&] { check_export(job.config, job.model); });
  });
  return job;
}

void make_output_folder(const std::string& output) {
  std::error_code failed;
  std::filesystem::create_directories(output, failed);
  SAFEGRAD_CHECK(!failed, InputError,
                 "output: {} cannot be made: {}; choose another folder with --set output=FOLDER",
                 output, failed.message());
}

void print_header(const Job& job, const dist::Trainer& trainer, dist::Mesh& mesh) {
  const RunConfig& c = job.config;
  int64_t all = 0, trained = 0;
  for (const Unit& unit : job.model.decoder->units()) {
    for (const Parameter* p : unit.parameters) {
      all += p->numel();
      if (p->trainable) trained += p->numel();
    }
  }
  const std::string what =
      c.model.lora ? fmt::format("LoRA r{}", c.model.lora->rank) : "full fine-tuning";
  const std::string layout = mesh.shards() == 1     ? "data parallel"
                             : mesh.replicas() == 1 ? "fully sharded"
                                                    : fmt::format("{} replicas x {} shards",
                                                                  mesh.replicas(), mesh.shards());
  const Backend& backend = job.device->backend();
  fmt::print("safegrad {} · {}, {} ({:.2f} M of {:.0f} M trained) · {} ranks, {}, {}, {}\n",
             SAFEGRAD_VERSION, job.model.name, what, trained / 1e6, all / 1e6, mesh.world().size(),
             backend.device().is_cpu() ? "mpi" : "nccl", backend.name(), layout);
  auto describe = [](const char* label, const TokenFile& file) {
    std::string sources;
    if (file.has_sources() && file.sources().size() > 1) {
      std::vector<int64_t> counts(file.sources().size(), 0);
      for (int64_t i = 0; i < file.size(); ++i) ++counts[static_cast<size_t>(file.source(i))];
      for (size_t s = 0; s < counts.size(); ++s) {
        sources +=
            fmt::format(", {:.1f} % {}",
                        100.0 * static_cast<double>(counts[s]) / static_cast<double>(file.size()),
                        file.sources()[s]);
      }
    }
    fmt::print("{:<7}{} sequences, {} tokens ({} scored){}\n", label, file.size(),
               file.total_tokens(), file.total_scored(), sources);
  };
  describe("task", *job.data.task);
  if (job.data.align) describe("align", *job.data.align);
  fmt::print("{} steps of {} + {} sequences · speed of light {:.0f} GFLOP/s over all ranks\n",
             trainer.total_steps(), c.batch.task_sequences, c.batch.align_sequences,
             trainer.gemm_rate() / 1e9);
  std::fflush(stdout);
}

std::string align_label(const RunConfig& config) {
  return config.objective.align_loss == AlignLoss::kl ? "kl" : "sft";
}

std::string version_comments(const dist::ControlPlane& world, const Backend& backend) {
  return fmt::format("# safegrad {}, LibTorch {}, {} ranks, {} threads a rank, {}\n",
                     SAFEGRAD_VERSION, SAFEGRAD_LIBTORCH_VERSION, world.size(),
                     at::get_num_threads(), backend.name());
}

struct Summary {
  StepRecord first, last;
  int64_t conflicts = 0, skipped = 0;
  double seconds = 0;

  void add(const StepRecord& record) {
    if (record.step == 1) first = record;
    last = record;
    conflicts += record.conflict;
    skipped += record.skipped;
    seconds += record.seconds;
  }
};

void print_summary(const Summary& s, const Job& job) {
  std::string align;
  if (s.last.loss_align) {
    align =
        fmt::format(" · {} {:.3f} → {:.3f} · conflicts in {} of {} steps", align_label(job.config),
                    *s.first.loss_align, *s.last.loss_align, s.conflicts, s.last.step);
  }
  if (s.skipped > 0) align += fmt::format(" · {} steps skipped (not finite)", s.skipped);
  fmt::print("done in {} · task {:.3f} → {:.3f}{} · model in {}/model\n",
             format_duration(s.seconds), s.first.loss_task, s.last.loss_task, align,
             job.config.output);
  for (const auto& [name, measures] : s.last.probe) {
    std::string text;
    for (const auto& [measure, value] : measures)
      text += fmt::format("  {} {:.3f}", measure, value);
    fmt::print("probe {}:{}\n", name, text);
  }
}

std::unique_ptr<models::HfExport> make_export(const Job& job) {
  const RunConfig& c = job.config;
  const bool adapter = c.model.lora && !c.model.lora->merge;
  return std::make_unique<models::HfExport>(
      models::ExportTarget{c.output + "/model", job.model.base_folder, c.model.config,
                           c.model.dtype, adapter ? c.model.lora : std::nullopt});
}

void print_warnings(const Job& job, const CommandLine& line, const dist::ControlPlane& world) {
  if (world.rank() != 0 || line.quiet) return;
  for (const std::string& warning : job.warnings) fmt::print(stderr, "warning: {}\n", warning);
}

}  // namespace

void train(const CommandLine& line, dist::Launcher& launcher) {
  Job job = open_job(line, launcher, Purpose::train);
  print_warnings(job, line, launcher.control());
  const bool speaks = launcher.control().rank() == 0;
  const bool talks = speaks && !line.quiet;
  dist::Mesh mesh(job.device->connect(), job.config.parallel.shards);

  std::unique_ptr<MetricsFile> metrics;
  dist::agree(mesh.world(), [&] {
    if (!speaks) return;
    make_output_folder(job.config.output);
    const std::string path = job.config.output + "/metrics.jsonl";
    std::filesystem::remove(path);
    write_file_atomically(
        job.config.output + "/config.yaml",
        version_comments(mesh.world(), job.device->backend()) + to_yaml(job.config));
    metrics = std::make_unique<MetricsFile>(path);
  });
  dist::Trainer trainer(job.config, *job.model.decoder, *job.model.weights, job.data, mesh);
  trainer.measure_speed_of_light();
  if (talks) print_header(job, trainer, mesh);

  ProgressLine progress(stdout, trainer.total_steps(), align_label(job.config));
  Summary summary;
  for (int64_t i = 0; i < trainer.total_steps(); ++i) {
    StepRecord record = trainer.step(i);
    record.probe = trainer.run_probes(i + 1);
    summary.add(record);
    if (metrics)
      metrics->write(record);  // a full disk ends the job through main: no collective for it
    if (talks) progress.show(record);
  }
  if (talks) progress.finish();
  const auto sink = speaks ? make_export(job) : nullptr;
  trainer.export_model(job.config.model.lora && job.config.model.lora->merge, sink.get());
  if (talks) print_summary(summary, job);
}

void check(const CommandLine& line, dist::Launcher& launcher) {
  const Job job = open_job(line, launcher, Purpose::check);
  const dist::ControlPlane& world = launcher.control();
  print_warnings(job, line, world);
  if (world.rank() == 0 && !line.quiet) {
    fmt::print("{}: valid for {} ranks; nothing was run\n", line.config, world.size());
  }
}

void evaluate(const CommandLine& line, dist::Launcher& launcher) {
  Job job = open_job(line, launcher, Purpose::evaluate);
  print_warnings(job, line, launcher.control());
  dist::Mesh mesh(job.device->connect(), job.config.parallel.shards);
  const auto results =
      dist::evaluate_probes(job.config, *job.model.decoder, *job.model.weights, job.data, mesh);
  if (mesh.world().rank() == 0) fmt::print("{}\n", nlohmann::ordered_json(results).dump());
}

}  // namespace safegrad
