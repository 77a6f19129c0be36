// config.h: everything a run can be told, read from YAML, checked key by key.
// Longer than other headers because it is the whole list of keys; their ranges are in
// config_keys.h.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace safegrad {

// The spelling of each enumerator in YAML is in enum_names.h.
enum class ComputeDtype { float32, bfloat16 };
enum class Rule { sft, weighted_sum, safegrad, agem, pcgrad, mgda, cagrad, ogpsa, lisa };
enum class AlignLoss { kl, sft };
enum class KlPositions { response, all };
enum class ScheduleKind { constant, linear, cosine };
enum class Device { automatic, cpu, cuda };  ///< `automatic` is spelled "auto" in YAML
enum class Recompute { none, block };
enum class Surgery { global, block };
enum class GradientMode { one_pass, two_pass };
enum class FrozenWeights { sharded, replicated };

struct LoraConfig {
  int64_t rank = 8;      ///< > 0
  double alpha = 16.0;   ///< scale is alpha / rank; > 0
  double dropout = 0.0;  ///< [0, 1), on the adapter's input
  /// Distinct, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
  std::vector<std::string> targets = {"q_proj", "k_proj", "v_proj"};
  bool merge = false;  ///< write a whole model with the adapters merged, not an adapter folder

  bool operator==(const LoraConfig&) const = default;
};

struct ModelSection {
  std::string path;    ///< Hugging Face folder or PEFT adapter folder; exactly one of path, config
  std::string config;  ///< config.json: random weights of that shape
  ComputeDtype dtype = ComputeDtype::float32;
  std::optional<LoraConfig> lora;
  /// ECMAScript regexes that match whole parameter names. Not given with lora: load_config then
  /// leaves it empty, since only the adapters are trained.
  std::vector<std::string> trainable = {".*"};

  bool operator==(const ModelSection&) const = default;
};

struct DataSection {
  std::string task;   ///< token file; required by train
  std::string align;  ///< token file; required by every rule but sft

  bool operator==(const DataSection&) const = default;
};

/// Phases of rule lisa, in turn, the alignment's first.
struct LisaConfig {
  int64_t align_steps = 100;  ///< > 0
  int64_t task_steps = 900;   ///< > 0
  double rho = 1.0;           ///< of the proximal term ρ/2 |w − w_anchor|², >= 0

  bool operator==(const LisaConfig&) const = default;
};

struct ObjectiveSection {
  Rule rule = Rule::safegrad;
  double rho = 1.0;       ///< weight of the alignment gradient (safegrad, weighted_sum), >= 0
  double cagrad_c = 0.4;  ///< [0, 1)
  Surgery surgery = Surgery::global;  ///< one Gram matrix for the rule, or one for each block
  AlignLoss align_loss = AlignLoss::kl;
  KlPositions kl_positions = KlPositions::response;
  GradientMode gradients = GradientMode::one_pass;
  int64_t align_every = 1;         ///< steps from one alignment gradient to the next, > 0
  double gate = 0;                 ///< robust deviations below the median score; 0 = off
  bool gram_per_block = false;     ///< also record uu, ua, aa of every block
  std::optional<LisaConfig> lisa;  ///< after load_config given with rule lisa and with no other

  bool operator==(const ObjectiveSection&) const = default;
};

struct BatchSection {          ///< a whole optimizer step, all ranks together
  int64_t task_sequences = 8;  ///< > 0
  /// > 0, or 0 with rule sft. With rule sft and an alignment set, the conflict is measured but not
  /// acted on. Not given and no alignment set: load_config sets 0.
  int64_t align_sequences = 8;
  int64_t max_tokens_per_rank = 4096;  ///< of one micro-batch, > 0

  bool operator==(const BatchSection&) const = default;
};

struct OptimizerSection {                      ///< AdamW
  double lr = 1e-5;                            ///< > 0
  std::array<double, 2> betas = {0.9, 0.999};  ///< each [0, 1)
  double eps = 1e-8;                           ///< > 0
  double weight_decay = 0.0;  ///< on matrices; vectors (norms, biases) are never decayed; >= 0
  double clip_norm = 1.0;     ///< of the combined gradient; 0 = off

  bool operator==(const OptimizerSection&) const = default;
};

struct ScheduleSection {
  ScheduleKind kind = ScheduleKind::constant;
  int64_t warmup_steps = 0;  ///< >= 0

  bool operator==(const ScheduleSection&) const = default;
};

struct TrainSection {             ///< after load_config exactly one of epochs, steps is set
  std::optional<int64_t> epochs;  ///< > 0, over the task data; neither given: 1 epoch
  std::optional<int64_t> steps;   ///< > 0
  uint64_t seed = 43;
  int64_t max_skipped_steps = 5;  ///< so many in a row (not finite) end the run; > 0

  bool operator==(const TrainSection&) const = default;
};

struct ParallelSection {
  Device device = Device::automatic;
  int64_t shards = 0;  ///< 0 is spelled "all"; else it must divide the number of ranks
  Recompute recompute = Recompute::none;
  ComputeDtype reduce_dtype = ComputeDtype::float32;
  FrozenWeights frozen = FrozenWeights::sharded;  ///< replicated: no gathers for frozen weights
  bool tf32 = false;  ///< float32 products on a GPU may round their inputs to TF32 (10 bits)
  double timeout_seconds = 600;  ///< of one collective, or of a disk; then it ends; [1, 1e6]

  bool operator==(const ParallelSection&) const = default;
};

struct ProbeConfig {
  std::string name;  ///< [A-Za-z0-9_-]+, unique; required
  std::string file;  ///< token file; with choice groups: shares of classes; without: loss and KL
  int64_t every_steps = 0;  ///< 0: only at the end

  bool operator==(const ProbeConfig&) const = default;
};

struct CheckpointSection {
  int64_t every_steps = 0;  ///< 0 = off
  int64_t keep_last = 2;    ///< > 0
  int64_t keep_every = 0;   ///< steps that are multiples of it are kept for ever; 0 = none

  bool operator==(const CheckpointSection&) const = default;
};

struct RunConfig {
  ModelSection model;
  DataSection data;
  ObjectiveSection objective;
  BatchSection batch;
  OptimizerSection optimizer;
  ScheduleSection schedule;
  TrainSection train;
  ParallelSection parallel;
  std::vector<ProbeConfig> probe;
  CheckpointSection checkpoint;
  std::string output;  ///< required

  bool operator==(const RunConfig&) const = default;
};

/// Reads `path`, then applies `overrides` in order ("a.b=value", value parsed as YAML; "a.b=null"
/// takes the key out; "probe" only as a whole), then checks every key and range. Paths in the file
/// are as typed. Throws ConfigError: file, line (or --set), key, what was got, what is allowed, the
/// nearest right key for an unknown one; all mistakes at once, contradictions between keys where
/// there are no others. Refused: unknown, duplicate, missing, mistyped keys, values out of range.
RunConfig load_config(const std::string& path, const std::vector<std::string>& overrides);

/// A config as load_config returns it, as YAML that load_config reads back to an equal value.
std::string to_yaml(const RunConfig& config);

/// Every key that is given, by its dotted name, with its value as to_yaml spells it. A list of
/// sections counts its elements: probe[0].name.
std::map<std::string, std::string> config_values(const RunConfig& config);

}  // namespace safegrad
