#include "job.h"

#include <array>
#include <cstring>
#include <filesystem>

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <unistd.h>

#include "core/error.h"
#include "core/gpu_limits.h"
#include "core/pack.h"
#include "core/sha256.h"
#include "core/words.h"
#include "cpu/cpu_backend.h"
#include "dist/cuda_module.h"
#include "dist/gate.h"
#include "dist/run_shape.h"
#include "dist/start_agreement.h"

namespace safegrad {
namespace {

void check_data_given(const CommandLine& line, const RunConfig& config, Purpose purpose) {
  if (purpose != Purpose::evaluate) {
    SAFEGRAD_CHECK(!config.data.task.empty(), ConfigError,
                   "data.task is missing: {} needs a token file",
                   purpose == Purpose::audit ? "audit" : "train");
    SAFEGRAD_CHECK(purpose != Purpose::audit || !config.data.align.empty(), ConfigError,
                   "data.align is missing: audit compares each sample's gradient with that of an "
                   "alignment set");
    SAFEGRAD_CHECK(
        purpose != Purpose::audit || line.steps > 0 || config.objective.align_loss != AlignLoss::kl,
        ConfigError,
        "--steps: got 0, but the KL to the start model has no gradient there; give 1 or more, or "
        "--set objective.align_loss=sft");
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

// What no run can be meant to do, though it can be done.
void warn_of_sizes(Job& job, int64_t ranks) {
  const RunConfig& c = job.config;
  const auto warn = [&](std::string text) { job.warnings.push_back(std::move(text)); };
  const int64_t drawn = c.batch.task_sequences + c.batch.align_sequences;
  if (ranks > drawn) {
    warn(
        fmt::format("{} of {} ranks have no sequence in a step, which draws {} in all: raise "
                    "batch.task_sequences, or start fewer",
                    ranks - drawn, ranks, drawn));
  }
  const auto check_draws = [&](const char* key, int64_t sequences, const TokenFile& file) {
    if (sequences <= file.size()) return;
    warn(fmt::format("{}: a step draws {} of the {} sequences of {}, some of them more than once",
                     key, sequences, file.size(), file.path()));
  };
  check_draws("batch.task_sequences", c.batch.task_sequences, *job.data.task);
  if (job.data.align)
    check_draws("batch.align_sequences", c.batch.align_sequences, *job.data.align);
  const int64_t steps = dist::count_steps(c, job.data.task->size());
  if (c.objective.gate > 0 && (steps * c.batch.task_sequences <= job.data.task->size() ||
                               job.data.task->size() < dist::Gate::kFewest)) {
    warn(
        fmt::format("objective.gate: nothing will be left out: the run draws {} of {}, and a gate "
                    "takes {} scores and samples that come again",
                    steps * c.batch.task_sequences, counted(job.data.task->size(), "sample"),
                    dist::Gate::kFewest));
  }
  if (c.schedule.warmup_steps >= steps) {
    warn(
        fmt::format("schedule.warmup_steps: the run has {}, so optimizer.lr is not reached in {} "
                    "of warm-up",
                    counted(steps, "step"), c.schedule.warmup_steps));
  }
}

// `check` reads headers alone, and does so on the host for a GPU's config: it runs where no GPU is.
const Backend& open_device(Job& job, dist::Launcher& launcher, Purpose purpose) {
  const ParallelSection& parallel = job.config.parallel;
  if (purpose == Purpose::check && parallel.device == Device::cuda) return cpu_backend();
  job.device = std::make_unique<RunDevice>(parallel, launcher, job.warnings);
  return job.device->backend();
}

// A run leaves the ranks' records in its folder, the other commands write nothing.
void guard_ranks(const RunConfig& config, dist::Launcher& launcher, Purpose purpose) {
  dist::ControlPlane& control = launcher.control();
  std::string folder;
  if (purpose == Purpose::train) {
    folder = control.broadcast(
        control.rank() == 0 ? dist::new_flight_folder(config.output + "/flight") : "", 0);
  }
  launcher.watchdog().guard({control.rank(), control.size(), collective_timeout(config.parallel),
                             "parallel.timeout_seconds", folder,
                             dist::all_gather_text(control, process_in_words())});
}

// What the ranks must agree on before they act on any of it.
std::vector<dist::Fact> facts_given(const CommandLine& line, const RunConfig& config,
                                    Purpose purpose) {
  const char* commands[] = {"train", "check", "evaluate", "audit"};
  std::vector<dist::Fact> facts = {
      {"version of safegrad", SAFEGRAD_VERSION},
      {"version of LibTorch", SAFEGRAD_LIBTORCH_VERSION},
      // The same version built elsewhere may round otherwise, and ranks would drift apart.
      {"program (SHA-256)", sha256_of_file("/proc/self/exe").substr(0, 16)},
      {"command", commands[static_cast<size_t>(purpose)]},
      {"--resume", line.resume.empty() ? "not given" : line.resume},
      {"--allow-change", line.allow_change ? "given" : "not given"},
      {"--steps", fmt::format("{}", line.steps)}};
  for (const auto& [key, value] : config_values(config)) facts.push_back({key, value});
  return facts;
}

std::string hexadecimal(uint64_t value) {
  return fmt::format("{:016x}", value);
}

// What they found under the same names.
std::vector<dist::Fact> facts_found(const Job& job, const Backend& backend) {
  const models::OpenedModel& model = job.model;
  const std::string& folder = model.base_folder;
  std::vector<dist::Fact> facts = {
      {"threads (OMP_NUM_THREADS)", fmt::format("{}", at::get_num_threads()), true},
      {"device", backend.name(), true},
      {"model config.json (SHA-256)",
       sha256_of_file(folder.empty() ? job.config.model.config : folder + "/config.json")},
      {"model tokenizer.json (SHA-256)",
       model.tokenizer_sha256.empty() ? "not there" : model.tokenizer_sha256},
      {"model weights (sample)",
       hexadecimal(sampled_fingerprint(model.decoder->units(), *model.weights))}};
  if (!backend.device().is_cpu())
    facts.push_back({"GPU part (SHA-256)", sha256_of_file(dist::cuda_module_path()).substr(0, 16)});
  auto add = [&](const std::string& name, const std::shared_ptr<const TokenFile>& file) {
    if (file) facts.push_back({name + " content", hexadecimal(file->fingerprint())});
  };
  add("data.task", job.data.task);
  add("data.align", job.data.align);
  for (size_t i = 0; i < job.data.probes.size(); ++i)
    add(fmt::format("probe[{}].file", i), job.data.probes[i]);
  return facts;
}

// Where a GPU's kernels are at hand they have refused such a model themselves.
void require_gpu(const models::DecoderConfig& shape) {
  require_gpu_norms(shape.hidden_size, shape.head_dim);
  require_gpu_attention(shape.head_dim);
}

}  // namespace

Job open_job(const CommandLine& line, dist::Launcher& launcher, Purpose purpose) {
  Job job;
  dist::ControlPlane& control = launcher.control();
  std::vector<dist::Fact> given, found;
  dist::agree(control, [&] {
    job.config = load_config(line.config, line.overrides);
    in_config(line, [&] { check_data_given(line, job.config, purpose); });
    given = facts_given(line, job.config, purpose);
  });
  dist::check_same_start(control, given, job.warnings);
  guard_ranks(job.config, launcher, purpose);
  const Backend& backend = open_device(job, launcher, purpose);
  dist::agree(control, [&] {
    in_config(line, [&] {
      job.model = open_named_model(job.config, backend, models::open_model);
      if (job.config.parallel.device == Device::cuda) require_gpu(job.model.decoder->config());
      dist::Mesh::check(line.ranks > 0 ? line.ranks : control.size(), job.config.parallel.shards);
    });
    if (purpose == Purpose::evaluate) {
      job.config.data = {};
      job.config.batch.align_sequences = 0;
    }
    if (purpose == Purpose::audit) {
      job.config.probe.clear();
      job.config.objective.rule = Rule::sft;
      job.config.objective.gate = 0;
      job.config.batch.align_sequences = 1;  // of the steps before the audit, which do not use it
    }
    in_config(line, [&] {
      job.data =
          dist::open_data(job.config, *job.model.decoder, job.model.tokenizer_sha256, job.warnings);
      check_lengths(job.config, job.data);
    });
    found = facts_found(job, backend);
    if (purpose == Purpose::evaluate) return;
    check_output(job.config.output);
    if (purpose == Purpose::audit) return;  // it writes no model
    in_config(line, [&] { check_export(job.config, job.model); });
    warn_of_sizes(job, line.ranks > 0 ? line.ranks : control.size());
  });
  dist::check_same_start(control, found, job.warnings);
  return job;
}

std::string process_in_words() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0) std::strcpy(name.data(), "unknown host");
  return fmt::format("{}, process {}", name.data(), getpid());
}

void print_warnings(const std::vector<std::string>& warnings, const CommandLine& line,
                    const dist::ControlPlane& world) {
  if (world.rank() != 0 || line.quiet) return;
  for (const std::string& warning : warnings) fmt::print(stderr, "warning: {}\n", warning);
}

}  // namespace safegrad
