// config_keys.h: every key of a config, once: its name, its member and what it may hold.
//
// A visitor reads, writes or lists the keys; it has
//   key(name, member)                   bool, enum, list of texts
//   key(name, member, Presence)         text
//   key(name, member, Range)            number, optional number, pair of numbers
//   key(name, member, Names)            list of distinct names out of these
//   section(name, member)               struct, or optional struct
//   list(name, member)                  list of structs
// An empty text, an empty list and an empty optional stand for a key that is not given.
#pragma once
#include <limits>
#include <string_view>

#include "core/config.h"
#include "core/enum_names.h"

namespace safegrad {

enum class Presence { optional, required };

/// The numbers from `low` to `high`, without `low` or `high` themselves where that bound is open.
struct Range {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool low_open = false;
  bool high_open = false;
  std::string_view word_for_zero = {};  ///< if any, it is the only spelling of 0

  bool contains(double x) const {
    return (low_open ? x > low : x >= low) && (high_open ? x < high : x <= high);
  }
};

inline constexpr Range kPositive{.low = 0, .low_open = true};
inline constexpr Range kNotNegative{.low = 0};
inline constexpr Range kFraction{.low = 0, .high = 1, .high_open = true};
inline constexpr Range kTimeout{.low = 1, .high = 1e6};  // of a collective, in seconds
inline constexpr Range kCountOrAll{.low = 1, .word_for_zero = "all"};

inline constexpr std::string_view kLoraTargets[] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                    "gate_proj", "up_proj", "down_proj"};

template <class Visitor>
void describe(Visitor& v, LoraConfig& lora) {
  v.key("rank", lora.rank, kPositive);
  v.key("alpha", lora.alpha, kPositive);
  v.key("dropout", lora.dropout, kFraction);
  v.key("targets", lora.targets, Names(kLoraTargets));
  v.key("merge", lora.merge);
}

template <class Visitor>
void describe(Visitor& v, ModelSection& model) {
  v.key("path", model.path, Presence::optional);
  v.key("config", model.config, Presence::optional);
  v.key("dtype", model.dtype);
  v.section("lora", model.lora);
  v.key("trainable", model.trainable);
}

template <class Visitor>
void describe(Visitor& v, DataSection& data) {
  v.key("task", data.task, Presence::optional);
  v.key("align", data.align, Presence::optional);
}

template <class Visitor>
void describe(Visitor& v, LisaConfig& lisa) {
  v.key("align_steps", lisa.align_steps, kPositive);
  v.key("task_steps", lisa.task_steps, kPositive);
  v.key("rho", lisa.rho, kNotNegative);
}

template <class Visitor>
void describe(Visitor& v, ObjectiveSection& objective) {
  v.key("rule", objective.rule);
  v.key("rho", objective.rho, kNotNegative);
  v.key("cagrad_c", objective.cagrad_c, kFraction);
  v.key("surgery", objective.surgery);
  v.key("align_loss", objective.align_loss);
  v.key("kl_positions", objective.kl_positions);
  v.key("gradients", objective.gradients);
  v.key("align_every", objective.align_every, kPositive);
  v.key("gate", objective.gate, kNotNegative);
  v.key("gram_per_block", objective.gram_per_block);
  v.section("lisa", objective.lisa);
}

template <class Visitor>
void describe(Visitor& v, BatchSection& batch) {
  v.key("task_sequences", batch.task_sequences, kPositive);
  v.key("align_sequences", batch.align_sequences, kNotNegative);
  v.key("max_tokens_per_rank", batch.max_tokens_per_rank, kPositive);
}

template <class Visitor>
void describe(Visitor& v, OptimizerSection& optimizer) {
  v.key("lr", optimizer.lr, kPositive);
  v.key("betas", optimizer.betas, kFraction);
  v.key("eps", optimizer.eps, kPositive);
  v.key("weight_decay", optimizer.weight_decay, kNotNegative);
  v.key("clip_norm", optimizer.clip_norm, kNotNegative);
}

template <class Visitor>
void describe(Visitor& v, ScheduleSection& schedule) {
  v.key("kind", schedule.kind);
  v.key("warmup_steps", schedule.warmup_steps, kNotNegative);
}

template <class Visitor>
void describe(Visitor& v, TrainSection& train) {
  v.key("epochs", train.epochs, kPositive);
  v.key("steps", train.steps, kPositive);
  v.key("seed", train.seed, kNotNegative);
  v.key("max_skipped_steps", train.max_skipped_steps, kPositive);
}

template <class Visitor>
void describe(Visitor& v, ParallelSection& parallel) {
  v.key("device", parallel.device);
  v.key("shards", parallel.shards, kCountOrAll);
  v.key("recompute", parallel.recompute);
  v.key("reduce_dtype", parallel.reduce_dtype);
  v.key("frozen", parallel.frozen);
  v.key("tf32", parallel.tf32);
  v.key("timeout_seconds", parallel.timeout_seconds, kTimeout);
}

template <class Visitor>
void describe(Visitor& v, ProbeConfig& probe) {
  v.key("name", probe.name, Presence::required);
  v.key("file", probe.file, Presence::required);
  v.key("every_steps", probe.every_steps, kNotNegative);
}

template <class Visitor>
void describe(Visitor& v, CheckpointSection& checkpoint) {
  v.key("every_steps", checkpoint.every_steps, kNotNegative);
  v.key("keep_last", checkpoint.keep_last, kPositive);
  v.key("keep_every", checkpoint.keep_every, kNotNegative);
}

template <class Visitor>
void describe(Visitor& v, RunConfig& config) {
  v.section("model", config.model);
  v.section("data", config.data);
  v.section("objective", config.objective);
  v.section("batch", config.batch);
  v.section("optimizer", config.optimizer);
  v.section("schedule", config.schedule);
  v.section("train", config.train);
  v.section("parallel", config.parallel);
  v.list("probe", config.probe);
  v.section("checkpoint", config.checkpoint);
  v.key("output", config.output, Presence::required);
}

}  // namespace safegrad
