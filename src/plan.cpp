#include "plan.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include "commands.h"
#include "core/error.h"
#include "core/gpu_limits.h"
#include "core/machine_memory.h"
#include "core/random_tokens.h"
#include "cpu/cpu_backend.h"
#include "dist/run_shape.h"
#include "job.h"

namespace safegrad {
namespace {

at::ScalarType compute_type(const RunConfig& config) {
  return config.model.dtype == ComputeDtype::bfloat16 ? at::kBFloat16 : at::kFloat;
}

bool any_likelihood(const dist::RunData& data) {
  return std::any_of(data.probes.begin(), data.probes.end(),
                     [](const auto& file) { return !file->has_choices(); });
}

KernelMemory kernel_memory(const RunConfig& config, bool gpu) {
  return {gpu, static_cast<int64_t>(c10::elementSize(compute_type(config))), at::get_num_threads()};
}

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = std::filesystem::temp_directory_path() / "safegrad-plan-XXXXXX";
    SAFEGRAD_CHECK(mkdtemp(pattern.data()), RunError, "{}: cannot make this folder", pattern);
    path_ = pattern;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

double measure_copy_rate() {
  const at::Tensor from = at::ones({int64_t{1} << 24}), to = at::zeros_like(from);
  double best = 1e300;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    to.copy_(from);
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return 2.0 * static_cast<double>(from.nbytes()) / best;
}

// Figures of this machine where the table has none, those of a rank: a machine's ranks share its
// cores and memory. What the user gave stays.
void measure_cpu(DeviceFigures& cpu, const RunConfig& config) {
  const auto ranks = static_cast<double>(cpu.ranks_per_node);
  double& rate =
      config.model.dtype == ComputeDtype::bfloat16 ? cpu.bfloat16_tflops : cpu.float32_tflops;
  // Measured is what products reach; a share that was given is for rates that were given.
  if (rate == 0)
    rate = cpu_backend().measure_gemm_rate(compute_type(config)) / 1e12 / ranks / cpu.gemm_share;
  if (cpu.memory_gb_per_s == 0) cpu.memory_gb_per_s = measure_copy_rate() / 1e9 / ranks;
  if (cpu.memory_gib == 0)
    cpu.memory_gib = static_cast<double>(machine_memory("")) / (1 << 30) / ranks;
}

std::string device_name(const RunConfig& config, const PlanOptions& options) {
  if (!options.device.empty()) return options.device;
  SAFEGRAD_CHECK(config.parallel.device != Device::cuda, InputError,
                 "parallel.device is cuda: say which card is planned for: --device a100, h100, "
                 "h200, or one of --figures");
  return "cpu";
}

// Files of made-up lengths, as many sequences as a step takes.
void write_made_up(RunConfig& config, const PlanOptions& options, const std::string& folder,
                   int64_t vocab) {
  config.data.task = folder + "/task.safetensors";
  config.data.align = folder + "/align.safetensors";
  config.train.epochs.reset();
  config.train.steps = 1;
  const RandomTokens task{config.batch.task_sequences, options.tokens, options.scored, vocab, 1};
  write_random_tokens(config.data.task, task);
  if (config.batch.align_sequences == 0) return;
  write_random_tokens(config.data.align,
                      {config.batch.align_sequences, options.tokens, options.scored, vocab, 2});
}

// Every sequence alike: files are made only for a run.
std::vector<Stream> made_up_streams(const RunConfig& config, const PlanOptions& options) {
  std::vector<Stream> streams;
  for (int64_t sequences : {config.batch.task_sequences, config.batch.align_sequences}) {
    if (sequences == 0) continue;
    const bool all = !streams.empty() && dist::scores_all_positions(config);
    const auto n = static_cast<size_t>(sequences);
    streams.push_back({std::vector<int64_t>(n, options.tokens),
                       std::vector<int64_t>(n, all ? options.tokens : options.scored), sequences,
                       dist::turns_of(config, streams.size())});
  }
  return streams;
}

void check_files(const RunConfig& config) {
  std::string first, missing;
  for (const auto& [key, path] :
       {std::pair{"data.task", config.data.task}, std::pair{"data.align", config.data.align}}) {
    const bool needed = std::string(key) == "data.task" || config.batch.align_sequences > 0;
    if (!needed || std::filesystem::exists(path)) continue;
    if (!first.empty()) missing += fmt::format(", and {}: ", key);
    missing += fmt::format("{} is not there", path.empty() ? "a token file" : path);
    if (first.empty()) first = key;
  }
  if (first.empty()) return;
  throw NamedFileError(
      first,
      fmt::format("{}: a plan needs the lengths of the sequences; give --tokens-per-sequence "
                  "N to plan with sequences of one length",
                  missing));
}

class Planned {
 public:
  Planned(const CommandLine& line)
      : options_(line.plan), config_(load_config(line.config, line.overrides)) {
    in_config(line, [&] { open_model(); });
    open_device();
    in_config(line, [&] { open_lengths(); });
  }

  dist::RankPlan plan(int64_t ranks) { return dist::plan_rank(*model_.decoder, input_, ranks); }
  const PlanTitle& title() const { return title_; }

  RankRun run(const dist::RankPlan& plan) {
    // A model of its own: tables and buffers of a run before are not in this one's.
    auto model = models::open_model_shape(config_.model, config_.train.seed, cpu_backend());
    if (options_.tokens == 0) return run_rank(config_, model, data_, plan);
    const TemporaryFolder folder;
    RunConfig config = config_;
    config.probe.clear();
    write_made_up(config, options_, folder.path(), model.decoder->vocab_size());
    std::vector<std::string> unused;
    dist::RunData data = dist::open_data(config, *model.decoder, "", unused);
    if (input_.likelihood_probes) data.probes.push_back(data.task);
    return run_rank(config, model, std::move(data), plan);
  }

 private:
  void open_model() {
    model_ = open_named_model(config_, cpu_backend(), models::open_model_shape);
    title_.model = model_.name;
    title_.training =
        config_.model.lora ? fmt::format("LoRA r{}", config_.model.lora->rank) : "full fine-tuning";
    title_.max_tokens = config_.batch.max_tokens_per_rank;
  }

  void open_device() {
    input_.hardware = known_hardware();
    if (!options_.figures.empty()) read_hardware(options_.figures, input_.hardware);
    title_.device = device_name(config_, options_);
    DeviceFigures& device = input_.device = input_.hardware.device(title_.device);
    if (options_.ranks_per_node > 0) device.ranks_per_node = options_.ranks_per_node;
    if (!options_.network.empty()) device.between = options_.network;
    input_.hardware.network(device.between);
    title_.inside = device.inside;
    title_.between = device.between;
    SAFEGRAD_CHECK(!device.gpu || !options_.run, InputError,
                   "--run: the rank runs on this machine's cores; plan for --device cpu");
    if (device.gpu) {
      const auto& shape = model_.decoder->config();
      require_gpu_norms(shape.hidden_size, shape.head_dim);
      require_gpu_attention(shape.head_dim);
    } else {
      measure_cpu(device, config_);
    }
    title_.gemm_tflops = dist::gemm_rate(device, config_) / 1e12;
    title_.memory_gb_per_s = device.memory_gb_per_s;
    input_.kernels = kernel_memory(config_, device.gpu);
    input_.separate_machines = options_.run;
    title_.ranks_per_node = options_.run ? 1 : device.ranks_per_node;
  }

  void open_lengths() {
    if (options_.tokens == 0) {
      check_files(config_);
      data_ = dist::open_data(config_, *model_.decoder, model_.tokenizer_sha256, warnings_);
      const dist::PlanInput of_data = plan_input(config_, data_, false, 1);
      input_.streams = of_data.streams;
      input_.task_sequences = of_data.task_sequences;
      input_.likelihood_probes = of_data.likelihood_probes;
      input_.probes = of_data.probes;
      title_.lengths = "lengths of the data files";
    } else {
      if (options_.scored == 0) options_.scored = options_.tokens - 1;
      SAFEGRAD_CHECK(options_.scored < options_.tokens, InputError,
                     "--scored-per-sequence: got {}; allowed: 1 to {}, the first token of {} is "
                     "never scored",
                     options_.scored, options_.tokens - 1, options_.tokens);
      SAFEGRAD_CHECK(options_.tokens <= model_.decoder->max_positions(), InputError,
                     "--tokens-per-sequence: got {}; the model takes at most {}", options_.tokens,
                     model_.decoder->max_positions());
      input_.streams = made_up_streams(config_, options_);
      input_.likelihood_probes = any_made_up_likelihood();
      title_.lengths = fmt::format("sequences of {} tokens, {} scored (as given)", options_.tokens,
                                   options_.scored);
    }
    input_.config = config_;
  }

  // A probe whose file is not there is taken for the kind that needs more memory.
  bool any_made_up_likelihood() {
    for (const ProbeConfig& probe : config_.probe) {
      if (!std::filesystem::exists(probe.file)) return true;
      if (!TokenFile(probe.file, {}, warnings_).has_choices()) return true;
    }
    return false;
  }

  PlanOptions options_;
  RunConfig config_;
  models::OpenedModel model_;
  dist::RunData data_;
  dist::PlanInput input_;
  PlanTitle title_;
  std::vector<std::string> warnings_;
};

// One that cannot be planned spoils no other; where none can be, InputError.
std::vector<PlanOrReason> plan_each(Planned& planned, const std::vector<int64_t>& numbers) {
  std::vector<PlanOrReason> rows;
  bool any = false;
  for (int64_t ranks : numbers) {
    PlanOrReason& row = rows.emplace_back(PlanOrReason{ranks, {}, ""});
    try {
      row.plan = planned.plan(ranks);
      any = true;
    } catch (const InputError& e) {
      row.reason = e.what();
    }
  }
  SAFEGRAD_CHECK(any, InputError, "{}", rows.front().reason);
  return rows;
}

void print_plans(const CommandLine& line) {
  Planned planned(line);
  const std::vector<PlanOrReason> rows = plan_each(planned, line.plan.ranks);
  const bool table = !line.plan.json && rows.size() > 1;
  if (table) fmt::print("{}", plan_table(planned.title(), rows));
  for (const PlanOrReason& row : rows) {
    if (!row.plan) {
      if (line.plan.json) fmt::print("{}\n", plan_json(row.ranks, row.reason));
      continue;
    }
    const dist::RankPlan& plan = *row.plan;
    if (!line.plan.json && !table) fmt::print("{}", plan_in_full(planned.title(), plan));
    std::fflush(stdout);
    RankRun run;
    if (line.plan.run) run = planned.run(plan);
    if (line.plan.json)
      fmt::print("{}\n", plan_json(planned.title(), plan, line.plan.run ? &run : nullptr));
    if (!line.plan.run) continue;
    if (!line.plan.json) fmt::print("{}", run_in_words(plan, run));
    std::fflush(stdout);
    check_run(plan, run);
  }
}

}  // namespace

dist::PlanInput plan_input(const RunConfig& config, const dist::RunData& data, bool gpu,
                           int64_t near) {
  std::vector<ObjectiveData> objectives = {{data.task.get(), false, {}}};
  if (data.align) objectives.push_back({data.align.get(), dist::scores_all_positions(config), {}});
  dist::PlanInput input;
  input.config = config;
  input.streams = dist::make_streams(config, objectives);
  input.task_sequences = data.task->size();
  input.likelihood_probes = any_likelihood(data);
  for (const auto& file : data.probes) {
    if (file->has_choices()) continue;
    input.probes.push_back(dist::make_streams(config, {{file.get(), false, {}}}).front());
  }
  input.device.ranks_per_node = near;
  input.kernels = kernel_memory(config, gpu);
  return input;
}

int plan(const CommandLine& line, dist::Launcher& launcher) {
  const int started = launcher.control().size();
  dist::agree(launcher.control(), [&] {
    SAFEGRAD_CHECK(started == 1, InputError,
                   "plan: {} ranks were started; start it alone and give --ranks", started);
    print_plans(line);
  });
  return 0;
}

}  // namespace safegrad
