#include "core/config.h"

#include <algorithm>
#include <cstddef>
#include <regex>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "core/config_reader.h"
#include "core/enum_names.h"
#include "core/json.h"
#include "core/yaml_tree.h"

namespace safegrad {
namespace {

// std::regex takes stack for each bracket and memory for each repetition of an expression, and its
// own arithmetic overflows at a long back-reference.
constexpr size_t kMaxExpression = 256, kMaxExpressions = 64, kMaxDigits = 5;

[[noreturn]] void refuse_both(const YamlTree& tree, std::string_view first,
                              std::string_view second) {
  // Blames the one from --set, if any: that is the one just typed.
  if (tree.origin(first) == "--set") std::swap(first, second);
  tree.fail(second,
            fmt::format("cannot be combined with {} ({}); leave one out, or use --set {}=null",
                        first, tree.origin(first), first));
}

size_t longest_number(std::string_view text) {
  size_t longest = 0, digits = 0;
  for (const char c : text) {
    digits = c >= '0' && c <= '9' ? digits + 1 : 0;
    longest = std::max(longest, digits);
  }
  return longest;
}

void check_trainable(const YamlTree& tree, const std::vector<std::string>& trainable) {
  if (trainable.size() > kMaxExpressions) {
    tree.fail("model.trainable", fmt::format("got a list of {}, at most {} are allowed",
                                             trainable.size(), kMaxExpressions));
  }
  for (size_t i = 0; i < trainable.size(); ++i) {
    const std::string key = fmt::format("model.trainable[{}]", i);
    if (trainable[i].size() > kMaxExpression) {
      tree.fail(key, fmt::format("got an expression of {} characters, at most {} are allowed",
                                 trainable[i].size(), kMaxExpression));
    }
    if (longest_number(trainable[i]) > kMaxDigits) {
      tree.fail(key, fmt::format("got {}, in which a number has more than {} digits",
                                 shown(*tree.find(key)), kMaxDigits));
    }
    try {
      std::regex(trainable[i], std::regex::ECMAScript);
    } catch (const std::regex_error& error) {
      tree.fail(key, fmt::format("got \"{}\", which is no ECMAScript regular expression: {}",
                                 printable(trainable[i], kMaxExpression), error.what()));
    }
  }
}

void resolve_model(const YamlTree& tree, ModelSection& model) {
  if (model.path.empty() && model.config.empty()) {
    tree.fail("model.path",
              "missing; give a model folder, or model.config for random weights of a shape");
  }
  if (!model.path.empty() && !model.config.empty()) refuse_both(tree, "model.path", "model.config");

  if (model.lora) {
    if (tree.find("model.trainable")) refuse_both(tree, "model.lora", "model.trainable");
    model.trainable.clear();
  }
  check_trainable(tree, model.trainable);
}

/// Every rule but sft needs alignment data; sft may have it, to measure the conflict. A config
/// without any data is for evaluation: `train` refuses it.
void resolve_alignment(const YamlTree& tree, RunConfig& config) {
  const bool given = tree.find("batch.align_sequences") != nullptr;
  const std::string_view rule = name_of(config.objective.rule);
  int64_t& sequences = config.batch.align_sequences;

  const bool trains = !config.data.task.empty() || !config.data.align.empty();
  if (config.objective.rule != Rule::sft && trains) {
    if (config.data.align.empty()) {
      tree.fail("data.align",
                fmt::format("missing; objective.rule is {}, and only sft does without", rule));
    }
    if (sequences == 0) {
      tree.fail("batch.align_sequences",
                fmt::format("got 0, must be > 0 with objective.rule {} (0 is for sft)", rule));
    }
  } else if (config.data.align.empty()) {
    if (given && sequences > 0) {
      tree.fail("batch.align_sequences",
                fmt::format("got {}, but data.align is missing; give it, or set 0 to train without",
                            sequences));
    }
    sequences = 0;
  }
  const char* remedy = config.data.align.empty() ? "give data.align" : "raise that";
  const int64_t every = config.objective.align_every;
  if (every > 1 && trains && sequences == 0) {
    tree.fail("objective.align_every",
              fmt::format("got {}, but there is no alignment gradient: batch.align_sequences is 0; "
                          "leave it out, or {}",
                          every, remedy));
  }
  if (config.objective.gate > 0 && trains && sequences == 0) {
    tree.fail("objective.gate",
              fmt::format("got {}, but there is no alignment gradient to score samples with: "
                          "batch.align_sequences is 0; leave it out, or {}",
                          config.objective.gate, remedy));
  }
}

/// The KL and its gradient are zero where training starts, and the shortest combination of anything
/// with zero is zero.
void check_mgda(const YamlTree& tree, const RunConfig& config) {
  const ObjectiveSection& objective = config.objective;
  if (!config.data.task.empty() && objective.rule == Rule::mgda &&
      objective.align_loss == AlignLoss::kl) {
    tree.fail("objective.rule",
              "got mgda, which never leaves the start model with objective.align_loss kl: its "
              "gradient is 0 there, and mgda takes the shortest combination; set "
              "objective.align_loss: sft");
  }
}

/// lisa computes one gradient a step: there is nothing to combine, to keep or to compare.
void resolve_lisa(const YamlTree& tree, ObjectiveSection& objective, const TrainSection& train) {
  if (objective.rule != Rule::lisa) {
    if (objective.lisa) {
      tree.fail("objective.lisa",
                fmt::format("is for objective.rule lisa, which is {}; leave it out",
                            name_of(objective.rule)));
    }
    return;
  }
  if (!objective.lisa) objective.lisa.emplace();
  const std::pair<bool, const char*> contradictions[] = {
      {objective.align_every > 1, "objective.align_every"},
      {objective.surgery == Surgery::block, "objective.surgery"},
      {objective.gate > 0, "objective.gate"},
      {objective.gram_per_block, "objective.gram_per_block"}};
  for (const auto& [given, key] : contradictions) {
    if (given)
      tree.fail(key,
                fmt::format("got {}, but objective.rule is lisa, which computes one gradient a "
                            "step; leave it out",
                            shown(*tree.find(key))));
  }
  if (train.steps && *train.steps <= objective.lisa->align_steps) {
    tree.fail("train.steps",
              fmt::format("got {}, but rule lisa begins with objective.lisa.align_steps {}: no "
                          "step would be the task's; take more steps, or a shorter phase",
                          *train.steps, objective.lisa->align_steps));
  }
}

void resolve_train(const YamlTree& tree, TrainSection& train) {
  if (train.epochs && train.steps) refuse_both(tree, "train.epochs", "train.steps");
  if (!train.steps && !train.epochs) train.epochs = 1;
}

void check_probes(const YamlTree& tree, const std::vector<ProbeConfig>& probes) {
  const auto allowed = [](unsigned char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-';
  };
  for (size_t i = 0; i < probes.size(); ++i) {
    const std::string& name = probes[i].name;
    const std::string key = fmt::format("probe[{}].name", i);
    if (!std::all_of(name.begin(), name.end(), allowed)) {
      tree.fail(key,
                fmt::format("got {}, allowed: letters, digits, _ and -", shown(*tree.find(key))));
    }
    for (size_t j = 0; j < i; ++j) {
      if (probes[j].name == name) {
        tree.fail(key, fmt::format("got \"{}\" again, first in probe[{}] ({}); names are unique",
                                   name, j, tree.origin(fmt::format("probe[{}].name", j))));
      }
    }
  }
}

}  // namespace

RunConfig load_config(const std::string& path, const std::vector<std::string>& overrides) {
  YamlTree tree(path);
  for (const std::string& assignment : overrides) tree.set(assignment);

  ConfigMistakes mistakes;
  RunConfig config = read_config(tree, mistakes);
  mistakes.raise(path);  // what keys say together is looked at where each is right by itself
  mistakes.collect([&] { resolve_model(tree, config.model); });
  mistakes.collect([&] { resolve_alignment(tree, config); });
  mistakes.collect([&] { check_mgda(tree, config); });
  mistakes.collect([&] { resolve_lisa(tree, config.objective, config.train); });
  mistakes.collect([&] { resolve_train(tree, config.train); });
  mistakes.collect([&] { check_probes(tree, config.probe); });
  mistakes.raise(path);
  return config;
}

}  // namespace safegrad
