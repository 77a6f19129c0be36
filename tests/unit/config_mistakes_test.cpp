// config_mistakes_test.cpp: each kind of mistake in a config, and what its message must say.
// Longer than other sources because it is one table.
#include <algorithm>
#include <cctype>
#include <ostream>
#include <string>
#include <vector>

#include "unit/config_fixture.h"

namespace safegrad {
namespace {

/// One mistake in a config.
struct Mistake {
  const char* name;
  std::string text;
  std::vector<std::string> overrides;
  std::vector<std::string> expected;  ///< parts of the message, in order
};

void PrintTo(const Mistake& mistake, std::ostream* out) {
  *out << mistake.name;
}

/// kMinimal, then `lines`, the first of which is line 7.
std::string minimal_and(const std::string& lines) {
  return kMinimal + lines;
}

class ConfigMistake : public ConfigTest, public testing::WithParamInterface<Mistake> {};

TEST_P(ConfigMistake, IsRefusedWithPlaceAndRemedy) {
  const std::string message = error_of(GetParam().text, GetParam().overrides);

  size_t at = 0;
  for (const std::string& part : GetParam().expected) {
    const size_t found = message.find(part, at);
    ASSERT_NE(found, std::string::npos) << "no \"" << part << "\" after column " << at << " of:\n"
                                        << message;
    at = found + part.size();
  }
}

std::string test_name(const testing::TestParamInfo<Mistake>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(
    Keys, ConfigMistake,
    testing::Values(
        Mistake{"Unknown",
                minimal_and("objective:\n  rhoo: 1\n"),
                {},
                {"config.yaml:8: objective.rhoo: no such key; did you mean objective.rho? "
                 "(objective has: rule, rho, cagrad_c, "}},
        Mistake{"UnknownSection",
                minimal_and("optimiser: {lr: 1}\n"),
                {},
                {"config.yaml:7: optimiser: no such key; did you mean optimizer? (a config has: "
                 "model, data, "}},
        Mistake{"UnknownNested",
                minimal_and("probe:\n- name: a\n  file: b\n  flie: c\n"),
                {},
                {"config.yaml:10: probe[0].flie: no such key; did you mean probe[0].file? "
                 "(probe[0] has: name, file, every_steps)"}},
        Mistake{"InAnotherSection",
                minimal_and("lr: 1e-5\n"),
                {},
                {"config.yaml:7: lr: no such key; did you mean optimizer.lr?"}},
        Mistake{"UnlikeAnyOther",
                minimal_and("gpu_count: 2\n"),
                {},
                {"config.yaml:7: gpu_count: no such key (a config has: "}},
        Mistake{"DottedInFile",
                minimal_and("objective.rho: 1\n"),
                {},
                {"config.yaml:7: objective.rho: no such key; a file nests its sections"}},
        Mistake{"Duplicate",
                minimal_and("batch:\n  task_sequences: 1\n  task_sequences: 2\n"),
                {},
                {"config.yaml:9: batch.task_sequences: given twice, first on line 8"}},
        Mistake{"DuplicateSection",
                minimal_and("data: {}\n"),
                {},
                {"config.yaml:7: data: given twice, first on line 3"}},
        Mistake{"DuplicateInList",
                minimal_and("probe: [{name: a, file: b}, {name: c, name: d}]"),
                {},
                {"config.yaml:7: probe[1].name: given twice, first on line 7"}},
        Mistake{"MissingOutput",
                "model: {path: m}\ndata: {align: a}\n",
                {},
                {"config.yaml: output: missing"}},
        Mistake{"MissingProbeFile",
                minimal_and("probe:\n- file: a\n  name: b\n- name: a\n"),
                {},
                {"config.yaml:10: probe[1].file: missing"}},
        Mistake{"MissingProbeName",
                minimal_and("probe:\n- file: a\n"),
                {},
                {"config.yaml:8: probe[0].name: missing"}},
        Mistake{
            "Alias", "model: &m {path: m}\ndata: *m\n", {}, {"config.yaml:2: data: YAML aliases"}},
        Mistake{
            "SelfAlias", "model: &m {path: *m}\n", {}, {"config.yaml:1: model.path: YAML aliases"}},
        Mistake{"Tag", "model: {path: !!str m}\n", {}, {"config.yaml:1: model.path: YAML tags"}},
        Mistake{"MapAsKey",
                "model: {{a: b}: c}\n",
                {},
                {"config.yaml:1: model: got a section where a key"}},
        Mistake{"NullAsKey", "~: c\n", {}, {"config.yaml:1: got nothing where a key"}},
        Mistake{"OpenBracket", minimal_and("model2: [a\nb: c\n"), {}, {"config.yaml:"}}),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    Types, ConfigMistake,
    testing::Values(
        Mistake{"TextForNumber",
                minimal_and("optimizer:\n  lr: abc\n"),
                {},
                {"config.yaml:8: optimizer.lr: got \"abc\", expected a number"}},
        Mistake{"TrailingTextAfterNumber",
                minimal_and("optimizer: {lr: 1e-5x}\n"),
                {},
                {"optimizer.lr: got \"1e-5x\", expected a number"}},
        Mistake{"QuotedNumber",
                minimal_and("optimizer: {lr: '1e-5'}\n"),
                {},
                {"optimizer.lr: got \"1e-5\", expected a number without quotes"}},
        Mistake{"ListForNumber",
                minimal_and("optimizer: {lr: [1]}\n"),
                {},
                {"optimizer.lr: got a list, expected a number"}},
        Mistake{"NothingForNumber",
                minimal_and("optimizer:\n  lr:\n"),
                {},
                {"config.yaml:8: optimizer.lr: got nothing, expected a number"}},
        Mistake{"NanForNumber",
                minimal_and("optimizer: {lr: nan}\n"),
                {},
                {"optimizer.lr: got nan, which is not finite"}},
        Mistake{"YamlInfinityForNumber",
                minimal_and("optimizer: {lr: .inf}\n"),
                {},
                {"optimizer.lr: got \".inf\", expected a number"}},
        Mistake{"HugeNumber",
                minimal_and("optimizer: {lr: 1e999}\n"),
                {},
                {"optimizer.lr: got 1e999, which is not finite or does not fit"}},
        Mistake{"FractionForInteger",
                minimal_and("train: {steps: 8.0}\n"),
                {},
                {"train.steps: got \"8.0\", expected a whole number"}},
        Mistake{"ExponentForInteger",
                minimal_and("train: {steps: 1e3}\n"),
                {},
                {"train.steps: got \"1e3\", expected a whole number"}},
        Mistake{"HugeInteger",
                minimal_and("train: {steps: 9223372036854775808}\n"),
                {},
                {"train.steps: got 9223372036854775808, which is not finite or does not fit"}},
        Mistake{"HugeSeed",
                minimal_and("train: {seed: 18446744073709551616}\n"),
                {},
                {"train.seed: got 18446744073709551616, which is not finite or does not fit"}},
        Mistake{"YesForBoolean",
                minimal_and("objective: {gram_per_block: yes}\n"),
                {},
                {"objective.gram_per_block: got \"yes\", expected true or false"}},
        Mistake{"QuotedBoolean",
                minimal_and("objective: {gram_per_block: 'true'}\n"),
                {},
                {"objective.gram_per_block: got \"true\", expected true or false without quotes"}},
        Mistake{
            "UnknownEnumerator",
            minimal_and("objective: {rule: foo}\n"),
            {},
            {"objective.rule: got \"foo\", allowed: sft | weighted_sum | safegrad | agem | pcgrad "
             "| mgda | cagrad | ogpsa | lisa"}},
        Mistake{"EnumeratorInCpp",
                minimal_and("parallel: {device: automatic}\n"),
                {},
                {"parallel.device: got \"automatic\", allowed: auto | cpu | cuda"}},
        Mistake{"SectionForEnumerator",
                minimal_and("schedule: {kind: {a: b}}\n"),
                {},
                {"schedule.kind: got a section, allowed: constant | linear | cosine"}},
        Mistake{"WordForShards",
                minimal_and("parallel: {shards: most}\n"),
                {},
                {"parallel.shards: got \"most\", expected a whole number or all"}},
        Mistake{"AllForRank",
                minimal_and("train: {steps: all}\n"),
                {},
                {"train.steps: got \"all\", expected a whole number"}},
        Mistake{"TextForSection",
                minimal_and("batch: 5\n"),
                {},
                {"config.yaml:7: batch: got \"5\", expected a section (it has: task_sequences, "}},
        Mistake{"NothingForLora",
                "model:\n  path: m\n  lora:\n",
                {},
                {"config.yaml:3: model.lora: got nothing, expected a section (it has: rank, "}},
        Mistake{"SectionForList",
                minimal_and("probe: {name: a, file: b}\n"),
                {},
                {"probe: got a section, expected a list of sections"}},
        Mistake{
            "TextForListItem",
            minimal_and("probe: [refusal]\n"),
            {},
            {"probe[0]: got \"refusal\", expected a section (it has: name, file, every_steps)"}},
        Mistake{"ListForText",
                minimal_and("checkpoint: {}\n"),
                {"output=[a]"},
                {"config.yaml: --set output: got a list, expected a text"}},
        Mistake{"EmptyText", "model: {path: ''}\n", {}, {"model.path: got an empty text"}},
        Mistake{"TextForTexts",
                "model: {path: m, trainable: norm}\n",
                {},
                {"model.trainable: got \"norm\", expected a list of texts"}},
        Mistake{"EmptyTexts",
                "model: {path: m, trainable: []}\n",
                {},
                {"model.trainable: got an empty list"}},
        Mistake{"NumberForBetas",
                minimal_and("optimizer: {betas: 0.9}\n"),
                {},
                {"optimizer.betas: got \"0.9\", expected a list of two numbers"}},
        Mistake{"OneBeta",
                minimal_and("optimizer: {betas: [0.9]}\n"),
                {},
                {"optimizer.betas: got a list of 1, expected two numbers"}},
        Mistake{"ThreeBetas",
                minimal_and("optimizer: {betas: [0.9, 0.9, 0.9]}\n"),
                {},
                {"optimizer.betas: got a list of 3, expected two numbers"}},
        Mistake{"TextInBetas",
                minimal_and("optimizer: {betas: [0.9, x]}\n"),
                {},
                {"optimizer.betas[1]: got \"x\", expected a number"}}),
    test_name);

/// A value just outside the range of a key, and what the message says it must be.
struct OutOfRange {
  const char* key;
  const char* value;
  const char* must_be;
};

void PrintTo(const OutOfRange& value, std::ostream* out) {
  *out << value.key;
}

class ConfigRange : public ConfigTest, public testing::WithParamInterface<OutOfRange> {};

TEST_P(ConfigRange, ValueOutsideIsRefused) {
  const auto& [key, value, must_be] = GetParam();
  std::string name = key;
  const bool in_list = name.starts_with("optimizer.betas");
  if (in_list) name.resize(name.size() - 3);
  const std::string text = in_list ? fmt::format("[{}, 0]", value) : std::string(value);

  const std::string message = error_of(kMinimal, {name + "=" + text});

  EXPECT_EQ(message,
            "config.yaml: --set " + std::string(key) + ": got " + value + ", must be " + must_be);
}

INSTANTIATE_TEST_SUITE_P(
    Bounds, ConfigRange,
    testing::Values(
        OutOfRange{"model.lora.rank", "0", "> 0"}, OutOfRange{"model.lora.alpha", "0.0", "> 0"},
        OutOfRange{"model.lora.dropout", "1", "in [0, 1)"},
        OutOfRange{"model.lora.dropout", "-0.1", "in [0, 1)"},
        OutOfRange{"objective.rho", "-1", ">= 0"},
        OutOfRange{"objective.cagrad_c", "1.0", "in [0, 1)"},
        OutOfRange{"batch.task_sequences", "0", "> 0"},
        OutOfRange{"objective.align_every", "0", "> 0"}, OutOfRange{"objective.gate", "-1", ">= 0"},
        OutOfRange{"objective.lisa.align_steps", "0", "> 0"},
        OutOfRange{"objective.lisa.task_steps", "0", "> 0"},
        OutOfRange{"objective.lisa.rho", "-1", ">= 0"},
        OutOfRange{"batch.align_sequences", "-1", ">= 0"},
        OutOfRange{"batch.max_tokens_per_rank", "0", "> 0"}, OutOfRange{"optimizer.lr", "0", "> 0"},
        OutOfRange{"optimizer.lr", "-1", "> 0"}, OutOfRange{"optimizer.betas[0]", "1", "in [0, 1)"},
        OutOfRange{"optimizer.betas[0]", "-0.5", "in [0, 1)"},
        OutOfRange{"optimizer.eps", "0", "> 0"},
        OutOfRange{"optimizer.weight_decay", "-1e-9", ">= 0"},
        OutOfRange{"optimizer.clip_norm", "-1", ">= 0"},
        OutOfRange{"schedule.warmup_steps", "-1", ">= 0"}, OutOfRange{"train.epochs", "0", "> 0"},
        OutOfRange{"train.steps", "0", "> 0"}, OutOfRange{"train.seed", "-1", ">= 0"},
        OutOfRange{"train.max_skipped_steps", "0", "> 0"},
        OutOfRange{"parallel.shards", "0", ">= 1 or all"},
        OutOfRange{"parallel.shards", "-2", ">= 1 or all"},
        OutOfRange{"checkpoint.every_steps", "-1", ">= 0"},
        OutOfRange{"checkpoint.keep_every", "-1", ">= 0"},
        OutOfRange{"checkpoint.keep_last", "0", "> 0"}),
    [](const testing::TestParamInfo<OutOfRange>& info) {
      std::string name = std::string(info.param.key) + "_" + std::to_string(info.index);
      std::replace_if(
          name.begin(), name.end(), [](unsigned char c) { return !std::isalnum(c); }, '_');
      return name;
    });

INSTANTIATE_TEST_SUITE_P(
    Contradictions, ConfigMistake,
    testing::Values(
        Mistake{"NeitherPathNorConfig",
                "data: {align: a}\noutput: o\n",
                {},
                {"config.yaml: model.path: missing;", "model.config"}},
        Mistake{"PathAndConfig",
                "model:\n  path: m\n  config: c\noutput: o\n",
                {},
                {"config.yaml:3: model.config: cannot be combined with model.path (line 2)"}},
        Mistake{"EpochsAndSteps",
                minimal_and("train:\n  steps: 1\n  epochs: 1\n"),
                {},
                {"config.yaml:8: train.steps: cannot be combined with train.epochs (line 9)"}},
        Mistake{"StepsBySet",
                minimal_and("train: {epochs: 1}\n"),
                {"train.steps=5"},
                {"config.yaml: --set train.steps: cannot be combined with train.epochs (line 7)",
                 "--set train.epochs=null"}},
        Mistake{"EpochsBySet",
                minimal_and("train: {steps: 1}\n"),
                {"train.epochs=5"},
                {"config.yaml: --set train.epochs: cannot be combined with train.steps (line 7)",
                 "--set train.steps=null"}},
        Mistake{"LoraAndTrainable",
                minimal_and(""),
                {"model.lora.rank=4", "model.trainable=['.*']"},
                {"config.yaml: --set model.", "cannot be combined with model."}},
        Mistake{"RuleWithoutAlign",
                "model: {path: m}\ndata: {task: t}\noutput: o\n",
                {"objective.rule=pcgrad"},
                {"config.yaml:2: data.align: missing; objective.rule is pcgrad, and only sft"}},
        Mistake{"DefaultRuleWithoutAlign",
                "model: {path: m}\ndata:\n  task: t\noutput: o\n",
                {},
                {"config.yaml:2: data.align: missing; objective.rule is safegrad"}},
        Mistake{"RuleWithNoAlignSequences",
                minimal_and("batch: {align_sequences: 0}\n"),
                {},
                {"config.yaml:7: batch.align_sequences: got 0, must be > 0 with objective.rule "
                 "safegrad"}},
        Mistake{
            "SftAlignSequencesWithoutAlign",
            "model: {path: m}\nobjective: {rule: sft}\nbatch: {align_sequences: 4}\noutput: o\n",
            {},
            {"config.yaml:3: batch.align_sequences: got 4, but data.align is missing"}},
        Mistake{"TurnsOfAnotherRule",
                minimal_and("objective: {rule: agem, lisa: {rho: 1}}\n"),
                {},
                {"objective.lisa: is for objective.rule lisa, which is agem"}},
        Mistake{"OneGradientAStep",
                minimal_and("objective: {rule: lisa, surgery: block}\n"),
                {},
                {"objective.surgery: got \"block\", but objective.rule is lisa, which computes one "
                 "gradient a step"}},
        Mistake{"NoTaskStep",
                minimal_and("objective: {rule: lisa}\ntrain: {steps: 100}\n"),
                {},
                {"train.steps: got 100, but rule lisa begins with objective.lisa.align_steps 100"}},
        Mistake{
            "StaysAtTheStart",
            minimal_and("objective: {rule: mgda}\n"),
            {},
            {"objective.rule: got mgda, which never leaves the start model", "align_loss: sft"}},
        Mistake{"NothingToRenew",
                "model: {path: m}\ndata: {task: t}\nobjective: {rule: sft, align_every: 2}\n"
                "output: o\n",
                {},
                {"config.yaml:3: objective.align_every: got 2, but there is no alignment "
                 "gradient"}},
        Mistake{"NothingToScoreWith",
                "model: {path: m}\ndata: {task: t}\nobjective: {rule: sft, gate: 2.5}\noutput: o\n",
                {},
                {"config.yaml:3: objective.gate: got 2.5, but there is no alignment gradient to "
                 "score samples with"}},
        Mistake{"OneGradientAStepScoresNothing",
                minimal_and("objective: {rule: lisa, gate: 3}\n"),
                {},
                {"objective.gate: got \"3\", but objective.rule is lisa, which computes one "
                 "gradient a step"}},
        Mistake{
            "DuplicateProbe",
            minimal_and("probe:\n- {name: a, file: b}\n- {name: c, file: b}\n- {name: a, file: d}"),
            {},
            {"config.yaml:10: probe[2].name: got \"a\" again, first in probe[0] (line 8)"}},
        Mistake{"ProbeName",
                minimal_and("probe: [{name: a b, file: b}]\n"),
                {},
                {"config.yaml:7: probe[0].name: got \"a b\", allowed: letters, digits, _ and -"}},
        Mistake{"ProbeNameAsPath",
                minimal_and("probe: [{name: ../a, file: b}]\n"),
                {},
                {"probe[0].name: got \"../a\", allowed: letters"}},
        Mistake{"BadRegex",
                "model:\n  path: m\n  trainable:\n  - a\n  - '(b'\ndata: {align: a}\noutput: o",
                {},
                {"config.yaml:5: model.trainable[1]: got \"(b\", which is no ECMAScript"}},
        Mistake{
            "UnknownTarget",
            "model: {path: m, lora: {targets: [q_proj, lm_head]}}\noutput: o\n",
            {},
            {"model.lora.targets[1]: got \"lm_head\", allowed: q_proj | k_proj | v_proj | o_proj | "
             "gate_proj | up_proj | down_proj"}},
        Mistake{"DuplicateTarget",
                "model: {path: m, lora: {targets: [q_proj, q_proj]}}\noutput: o\n",
                {},
                {"model.lora.targets[1]: \"q_proj\" is listed twice"}},
        Mistake{"NoTargets",
                "model: {path: m, lora: {targets: []}}\noutput: o\n",
                {},
                {"model.lora.targets: got an empty list"}}),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    Overrides, ConfigMistake,
    testing::Values(
        Mistake{"NoEqualsSign",
                kMinimal,
                {"optimizer.lr"},
                {"config.yaml: --set optimizer.lr: expected KEY=VALUE"}},
        Mistake{"NoKey", kMinimal, {"=1"}, {"config.yaml: --set =1: expected KEY=VALUE"}},
        Mistake{"EmptyStep",
                kMinimal,
                {"optimizer..lr=1"},
                {"config.yaml: --set optimizer..lr=1: expected KEY=VALUE"}},
        Mistake{"NoValue",
                kMinimal,
                {"optimizer.lr="},
                {"config.yaml: --set optimizer.lr: got nothing after =", "null"}},
        Mistake{"Unknown",
                kMinimal,
                {"objective.rhoo=1"},
                {"config.yaml: --set objective.rhoo: no such key; did you mean objective.rho? "
                 "(objective has: rule, rho, "}},
        Mistake{"UnknownSection",
                kMinimal,
                {"objectiv.rho=1"},
                {"config.yaml: --set objectiv: no such key; did you mean objective?"}},
        Mistake{"UnknownTakenOut",
                kMinimal,
                {"objective.rhoo=null"},
                {"config.yaml: --set objective.rhoo: no such key; did you mean objective.rho?"}},
        Mistake{
            "RequiredTakenOut", kMinimal, {"output=null"}, {"config.yaml: --set output: missing"}},
        Mistake{"ThroughAList",
                minimal_and("probe: [{name: a, file: b}]\n"),
                {"probe.name=c"},
                {"config.yaml: --set probe.name: probe is a list; set it as a whole"}},
        Mistake{"ThroughAText",
                kMinimal,
                {"model.path.x=c"},
                {"config.yaml: --set model.path.x: path is \"models/tiny\"; set it as a whole"}},
        Mistake{"IndexedList",
                minimal_and("probe: [{name: a, file: b}]\n"),
                {"probe[0].name=c"},
                {"config.yaml: --set probe[0].name: an item of a list has no key; set the list"}},
        Mistake{"OpenQuote",
                kMinimal,
                {"output='a"},
                {"config.yaml: --set output: got \"'a\", which is no YAML value: "}},
        Mistake{"ReservedCharacter",
                kMinimal,
                {"output=@a"},
                {"config.yaml: --set output: got \"@a\", which is no YAML value: "}},
        Mistake{"OpenBrace",
                kMinimal,
                {"output={a: b"},
                {"config.yaml: --set output: got a section where a key should be; is a bracket or "
                 "quote left open?"}},
        Mistake{"DuplicateInValue",
                kMinimal,
                {"model.lora={rank: 1, rank: 2}"},
                {"config.yaml: --set model.lora.rank: given twice"}},
        Mistake{"MistakeInsideListValue",
                kMinimal,
                {"probe=[{name: a}]"},
                {"config.yaml: --set probe[0].file: missing"}},
        Mistake{"LineOfTheFileStays",
                minimal_and("optimizer:\n  lr: -1\n"),
                {"optimizer.eps=1e-9"},
                {"config.yaml:8: optimizer.lr: got -1, must be > 0"}}),
    test_name);

}  // namespace
}  // namespace safegrad
