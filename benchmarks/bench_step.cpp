// bench_step.cpp: time, speed of light, memory and traffic of whole optimizer steps, on random
// weights or any config's.
//
//   mpirun -n 2 build/bench_step --steps 10 --task-sequences 2 --align-sequences 1
//   --sequence-length 256
//   build/bench_step --model benchmarks/llama3-8b.json --set model.dtype=bfloat16 --set
//   model.lora.rank=8
//
// Sequence counts are per rank; --set takes any key of a config. Prints one JSON line from rank 0.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>

#include <ATen/Parallel.h>
#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <malloc.h>
#include <nlohmann/json.hpp>
#include <sys/resource.h>
#include <unistd.h>

#include "core/enum_names.h"
#include "core/files.h"
#include "core/random_tokens.h"
#include "device.h"
#include "dist/launcher.h"
#include "dist/trainer.h"
#include "models/open_model.h"

namespace {

using namespace safegrad;

struct Options {
  int64_t steps = 10, warmup = 2, task_sequences = 2, align_sequences = 1, sequence_length = 256,
          shards = 0;
  std::string rule = "safegrad", model = SAFEGRAD_SOURCE_DIR "/benchmarks/smollm2-135m.json",
              gradients = "one_pass";
  std::vector<std::string> data;  // task and alignment token files instead of random tokens
  std::vector<std::string> overrides;
  double peak_tflops = 0;  // of a device, as its maker states it; 0: no MFU
};

// The command line has checked that it is one.
Rule parse_rule(const std::string& name) {
  const auto names = names_of(Rule{});
  return static_cast<Rule>(std::find(names.begin(), names.end(), name) - names.begin());
}

// Gathers and reductions run in the shard group, all-reduces in the replicas', scalars in the
// world.
std::map<std::string, dist::Traffic> traffic_of(dist::Mesh& mesh) {
  auto traffic = mesh.shard_group().traffic();
  const auto& of_replicas = mesh.replica_group().traffic();
  traffic.insert(of_replicas.begin(), of_replicas.end());
  traffic["scalars"] = mesh.world().traffic().at("scalars");
  return traffic;
}

RunConfig make_config(const Options& o, const std::string& folder, int ranks) {
  RunConfig config;
  if (std::filesystem::is_directory(o.model)) {
    config.model.path = o.model;
  } else {
    config.model.config = o.model;
  }
  config.model.trainable.clear();  // not written, so that --set model.lora.rank may follow
  config.data.task = o.data.empty() ? folder + "/task.safetensors" : o.data[0];
  config.data.align = o.data.size() < 2 ? folder + "/align.safetensors" : o.data[1];
  config.objective.rule = parse_rule(o.rule);
  config.objective.gradients =
      o.gradients == "two_pass" ? GradientMode::two_pass : GradientMode::one_pass;
  config.batch.task_sequences = o.task_sequences * ranks;
  config.batch.align_sequences = o.align_sequences * ranks;
  config.batch.max_tokens_per_rank = 1 << 16;
  config.optimizer.lr = 1e-5;
  config.train.steps = o.steps + o.warmup;
  config.parallel.shards = o.shards;
  config.output = folder;
  return config;
}

// Rank 0 makes the folder, the random data and the base config; every rank reads the config with
// --set on top.
RunConfig prepare(const Options& o, dist::ControlPlane& control) {
  std::string folder;
  dist::agree(control, [&] {
    if (control.rank() != 0) return;
    std::string pattern = std::filesystem::temp_directory_path() / "safegrad-bench-XXXXXX";
    folder = mkdtemp(pattern.data());
    const RunConfig base = make_config(o, folder, control.size());
    write_file_atomically(folder + "/config.yaml", to_yaml(base));
    if (!o.data.empty()) return;
    const int64_t n = 8 * control.size();
    // All positions are scored.
    const int64_t length = o.sequence_length, scored = length - 1, words = 1000;
    write_random_tokens(base.data.task,
                        {n * std::max<int64_t>(1, o.task_sequences), length, scored, words, 1});
    if (o.align_sequences > 0)
      write_random_tokens(base.data.align, {n * o.align_sequences, length, scored, words, 2});
  });
  folder = control.broadcast(folder, 0);
  RunConfig config;
  dist::agree(control, [&] { config = load_config(folder + "/config.yaml", o.overrides); });
  return config;
}

double peak_rss_gib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / (1 << 20);
}

// Of memory that several processes share, this process's part.
double proportional_gib() {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string word; file >> word;) {
    double kib = 0;
    if (word == "Pss:" && file >> kib) return kib / (1 << 20);
  }
  return 0;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

nlohmann::ordered_json measure(const Options& o, const RunConfig& config, dist::Mesh& mesh,
                               const Backend& backend) {
  auto model = models::open_model(config.model, config.train.seed, backend);
  std::vector<std::string> warnings;
  const auto data = dist::open_data(config, *model.decoder, model.tokenizer_sha256, warnings);
  dist::Trainer trainer(config, *model.decoder, *model.weights, data, mesh);
  trainer.measure_speed_of_light();

  std::vector<double> seconds, tokens, light;
  std::map<std::string, double> phases;
  std::map<std::string, dist::Traffic> before;
  for (int64_t i = 0; i < o.warmup + o.steps; ++i) {
    if (i == o.warmup) before = traffic_of(mesh);
    const StepRecord record = trainer.step(i);
    if (i < o.warmup) continue;
    seconds.push_back(record.seconds);
    tokens.push_back(static_cast<double>(record.task_tokens + record.align_tokens));
    light.push_back(record.speed_of_light);
    for (const auto& [name, value] : record.phase_seconds)
      phases[name] += value / static_cast<double>(o.steps);
  }
  const auto after_steps = traffic_of(mesh);
  const double own_rss = peak_rss_gib(), own_pss = proportional_gib();
  const auto rss = dist::all_gather_doubles(mesh.world(), std::span(&own_rss, 1));
  const auto pss = dist::all_gather_doubles(mesh.world(), std::span(&own_pss, 1));

  nlohmann::ordered_json result;
  result["device"] = backend.name();
  result["model"] = std::filesystem::path(o.model).filename().string();
  result["set"] = o.overrides;
  result["rule"] = o.rule;
  result["gradients"] = o.gradients;
  result["ranks"] = mesh.world().size();
  result["shards"] = mesh.shards();
  result["threads"] = at::get_num_threads();
  result["steps"] = o.steps;
  result["task_sequences"] = o.task_sequences;
  result["align_sequences"] = o.align_sequences;
  result["sequence_length"] = o.sequence_length;
  result["median_step_s"] = median(seconds);
  result["mean_step_s"] =
      std::accumulate(seconds.begin(), seconds.end(), 0.0) / static_cast<double>(seconds.size());
  result["min_step_s"] = *std::min_element(seconds.begin(), seconds.end());
  result["max_step_s"] = *std::max_element(seconds.begin(), seconds.end());
  result["tokens_per_s"] = median(tokens) / median(seconds);
  result["speed_of_light"] = median(light);
  result["gemm_gflops"] = trainer.gemm_rate() / 1e9;
  if (o.peak_tflops > 0) {
    const double flops_per_s = median(light) * trainer.gemm_rate() / mesh.world().size();
    result["mfu"] = flops_per_s / (o.peak_tflops * 1e12);
    result["mfu_formula"] =
        "necessary matrix products (forward, dX, and dW where trainable, causal half of attention, "
        "scored positions of the heads; no recomputation) / (median step s x peak_tflops x 1e12)";
    result["peak_tflops"] = o.peak_tflops;
  }
  if (!backend.device().is_cpu())
    result["peak_device_gib"] = static_cast<double>(backend.take_peak_bytes()) / (1 << 30);
  result["peak_rss_gib"] = *std::max_element(rss.begin(), rss.end());
  // Between steps, when the pools are full; shared pages are divided among the ranks.
  result["pss_gib"] = *std::max_element(pss.begin(), pss.end());
  result["phase_seconds"] = phases;
  for (const auto& [name, after] : after_steps) {
    const dist::Traffic& start = before[name];
    result["traffic_per_step"][name] = {{"calls", (after.calls - start.calls) / o.steps},
                                        {"bytes", (after.bytes - start.bytes) / o.steps}};
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  mallopt(M_MMAP_MAX, 0);  // as the safegrad program does
  mallopt(M_TRIM_THRESHOLD, -1);
  Options o;
  CLI::App app("Times whole optimizer steps; sequence counts are per rank.", "bench_step");
  app.add_option("--steps", o.steps, "timed steps");
  app.add_option("--warmup", o.warmup, "steps before them");
  app.add_option("--task-sequences", o.task_sequences);
  app.add_option("--align-sequences", o.align_sequences, "0 with --rule sft: plain fine-tuning");
  app.add_option("--sequence-length", o.sequence_length, "of random data");
  app.add_option("--shards", o.shards, "0: all ranks");
  const auto rules = names_of(Rule{});
  app.add_option("--rule", o.rule)
      ->check(CLI::IsMember(std::vector<std::string>(rules.begin(), rules.end())));
  app.add_option("--gradients", o.gradients, "one_pass | two_pass");
  app.add_option("--model", o.model, "config.json (random weights) or a model folder");
  app.add_option("--data", o.data, "token files of task and alignment instead of random tokens")
      ->expected(1, 2);
  app.add_option("--set", o.overrides, "any key of a config, e.g. --set model.dtype=bfloat16")
      ->type_name("KEY=VALUE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--peak-tflops", o.peak_tflops,
                 "of a device in that type: adds MFU to the result");
  bool json = true;
  app.add_flag("--json", json,
               "one JSON line is what it prints; accepted so that scripts can say so");
  CLI11_PARSE(app, argc, argv);

  std::unique_ptr<dist::Launcher> launcher;
  try {
    launcher = dist::make_launcher(&argc, &argv);
    const RunConfig config = prepare(o, launcher->control());
    std::vector<std::string> warnings;
    RunDevice device(config.parallel, *launcher, warnings);
    dist::Mesh mesh(device.connect(), config.parallel.shards);
    const auto result = measure(o, config, mesh, device.backend());
    mesh.world().barrier();
    if (mesh.world().rank() == 0) {
      std::filesystem::remove_all(config.output);
      fmt::print("{}\n", result.dump());
    }
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    if (launcher) launcher->abort(2);
    return 2;
  }
}
