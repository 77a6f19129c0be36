#include "describe.h"

#include <filesystem>
#include <vector>

#include <fmt/format.h>

#include "core/enum_names.h"
#include "core/words.h"
#include "dist/checkpoint_files.h"
#include "dist/run_shape.h"
#include "plan.h"

namespace safegrad {
namespace {

std::string file_in_words(const char* label, const TokenFile& file) {
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
  return fmt::format("{:<8}{}, {} ({} scored){}\n", label, counted(file.size(), "sequence"),
                     counted(file.total_tokens(), "token"), file.total_scored(), sources);
}

std::string probes_in_words(const RunConfig& config) {
  std::string text;
  for (const ProbeConfig& probe : config.probe) {
    text += text.empty() ? "" : ", ";
    text += probe.name;
    if (probe.every_steps > 0) text += fmt::format(" every {}", counted(probe.every_steps, "step"));
  }
  return text.empty() ? "" : fmt::format("{:<8}{}; all at the end\n", "probes", text);
}

std::string output_in_words(const std::string& output) {
  const char* state = "would be made";
  if (!dist::list_checkpoints(output + "/checkpoints").empty())
    state = "holds a run with checkpoints: train needs --resume auto there, or another folder";
  else if (std::filesystem::exists(output + "/metrics.jsonl"))
    state = "holds a run without checkpoints, whose files would be replaced";
  else if (std::filesystem::exists(output))
    state = "is there, without a run";
  return fmt::format("{:<8}{} ({})\n", "output", output, state);
}

}  // namespace

std::string model_in_words(const Job& job) {
  int64_t all = 0, trained = 0;
  for (const Unit& unit : job.model.decoder->units()) {
    for (const Parameter* p : unit.parameters) {
      all += p->numel();
      if (p->trainable) trained += p->numel();
    }
  }
  const auto& lora = job.config.model.lora;
  return fmt::format("{}, {} ({:.2f} M of {:.{}f} M trained)", job.model.name,
                     lora ? fmt::format("LoRA r{}", lora->rank) : "full fine-tuning",
                     static_cast<double>(trained) / 1e6, static_cast<double>(all) / 1e6,
                     all < 10'000'000 ? 2 : 0);
}

std::string layout_in_words(int64_t ranks, int64_t shards) {
  if (shards == 1) return "data parallel";
  if (shards == ranks) return "fully sharded";
  return fmt::format("{} replicas x {} shards", ranks / shards, shards);
}

std::string ranks_in_words(int64_t ranks, int64_t shards, bool gpu, const std::string& device) {
  return fmt::format("{}, {}, {}{}", counted(ranks, "rank"), gpu ? "nccl" : "mpi", device,
                     ranks == 1 ? "" : ", " + layout_in_words(ranks, shards));
}

std::string data_in_words(const dist::RunData& data) {
  std::string text = file_in_words("task", *data.task);
  if (data.align) text += file_in_words("align", *data.align);
  return text;
}

std::string planned_memory_in_words(const Job& job, bool gpu, int64_t ranks, int64_t near) {
  try {
    const auto memory =
        dist::plan_memory(*job.model.decoder, plan_input(job.config, job.data, gpu, near), ranks);
    return fmt::format("memory a rank: {}\n", memory_in_words(memory));
  } catch (const std::exception& error) {
    return fmt::format("memory a rank: cannot be planned: {}\n", error.what());
  }
}

std::string steps_in_words(const RunConfig& config, int64_t steps, int64_t task_sequences) {
  const ObjectiveSection& o = config.objective;
  const auto drawn =
      static_cast<double>(dist::turns_of(config, 0).before(steps) * config.batch.task_sequences);
  const double epochs = config.train.epochs ? static_cast<double>(*config.train.epochs)
                                            : drawn / static_cast<double>(task_sequences);
  std::string rule = fmt::format("rule {}", name_of(o.rule));
  if (o.rule == Rule::safegrad || o.rule == Rule::weighted_sum)
    rule += fmt::format(", rho {:g}", o.rho);
  if (o.rule == Rule::cagrad) rule += fmt::format(", cagrad_c {:g}", o.cagrad_c);
  if (o.lisa) {
    rule += fmt::format(", {} alignment and {} task steps in turns, rho {:g}", o.lisa->align_steps,
                        o.lisa->task_steps, o.lisa->rho);
  }
  if (o.surgery == Surgery::block && o.rule != Rule::sft) rule += ", surgery by block";
  if (o.gate > 0) rule += fmt::format(", gate {:g}", o.gate);
  if (o.align_every > 1) rule += fmt::format(", alignment every {} steps", o.align_every);
  return fmt::format(" ({:.3g} epoch{}) of {} + {} sequences, {}, lr {:g}", epochs,
                     epochs == 1 ? "" : "s", config.batch.task_sequences,
                     config.batch.align_sequences, rule, config.optimizer.lr);
}

std::string header_in_words(const Job& job, int64_t ranks, int64_t shards, int64_t near) {
  const Backend& backend = job.device->backend();
  const bool gpu = !backend.device().is_cpu();
  const int64_t samples = job.data.task->size(), steps = dist::count_steps(job.config, samples);
  return fmt::format("safegrad {} · {} · {}\n{}{}{}\n{}", SAFEGRAD_VERSION, model_in_words(job),
                     ranks_in_words(ranks, shards, gpu, backend.name()), data_in_words(job.data),
                     counted(steps, "step"), steps_in_words(job.config, steps, samples),
                     planned_memory_in_words(job, gpu, ranks, near));
}

std::string reading_in_words(const Job& job) {
  int64_t compared = 0;
  if (job.data.align && job.config.objective.align_loss == AlignLoss::kl)
    compared += job.data.align->size();
  for (const auto& probe : job.data.probes) {
    if (!probe->has_choices()) compared += probe->size();
  }
  if (compared == 0) return "reading the weights\n";
  return fmt::format(
      "reading the weights, and the start model's hidden states of {} (kept in {}/reference)\n",
      counted(compared, "sequence"), job.config.output);
}

std::string measures_in_words(const std::map<std::string, double>& measures) {
  std::string greedy, likeliest, others;
  const auto add_share = [](std::string& text, const std::string& name, double share) {
    text += fmt::format("{} {} {:.1f} %", text.empty() ? "" : ",", name, 100 * share);
  };
  for (const auto& [name, value] : measures) {
    if (name.starts_with("greedy_"))
      add_share(greedy, name.substr(7), value);
    else if (measures.contains("greedy_" + name))
      add_share(likeliest, name, value);
    else
      others += fmt::format(" {} {}", name, format_loss(value));
  }
  return greedy.empty() ? others
                        : fmt::format(" greedy reply{}; likeliest{}{}", greedy, likeliest, others);
}

std::string check_in_words(const Job& job, int64_t ranks, int64_t near) {
  const RunConfig& c = job.config;
  const bool gpu =
      c.parallel.device == Device::cuda || (job.device && !job.device->backend().device().is_cpu());
  const int64_t shards = c.parallel.shards == 0 ? ranks : c.parallel.shards;
  const std::string device = job.device ? job.device->backend().name() : "cuda (not looked for)";
  const int64_t steps = dist::count_steps(c, job.data.task->size());
  return fmt::format("{:<8}{}\n{}{}{:<8}{}{}\n{:<8}{}\n{}{}", "model", model_in_words(job),
                     data_in_words(job.data), probes_in_words(c), "steps", steps,
                     steps_in_words(c, steps, job.data.task->size()), "ranks",
                     ranks_in_words(ranks, shards, gpu, device),
                     planned_memory_in_words(job, gpu, ranks, near), output_in_words(c.output));
}

}  // namespace safegrad
