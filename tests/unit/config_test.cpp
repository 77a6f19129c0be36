#include "core/config.h"

#include <array>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/format.h>

#include "core/config_place.h"
#include "core/config_schema.h"
#include "core/enum_names.h"
#include "core/key_lister.h"
#include "unit/config_fixture.h"

namespace safegrad {
namespace {

constexpr char kFull[] = R"(model:
  path: models/tiny
  dtype: bfloat16
  lora:
    rank: 4
    alpha: 32
    dropout: 0.1
    targets: [q_proj, down_proj]
data:
  task: task.safetensors
  align: align.safetensors
objective:
  rule: cagrad
  rho: 0.5
  cagrad_c: 0.25
  surgery: block
  align_loss: sft
  kl_positions: all
  gradients: two_pass
  align_every: 4
  gate: 2.5
  gram_per_block: true
batch:
  task_sequences: 2
  align_sequences: 3
  max_tokens_per_rank: 512
optimizer:
  lr: 2e-5
  betas: [0.8, 0.95]
  eps: 1.0e-6
  weight_decay: 0.1
  clip_norm: 0
schedule:
  kind: cosine
  warmup_steps: 7
train:
  steps: 11
  seed: 18446744073709551615
  max_skipped_steps: 9
parallel:
  device: cuda
  shards: 2
  recompute: block
  reduce_dtype: bfloat16
  frozen: replicated
probe:
  - {name: refusal, file: refusal.safetensors, every_steps: 25}
  - name: utility-2
    file: utility.safetensors
checkpoint:
  every_steps: 100
  keep_last: 5
  keep_every: 1000
output: runs/full
)";

TEST_F(ConfigTest, LisaHasItsPhasesByDefault) {
  const std::string start = "model: {path: m}\ndata: {task: t, align: a}\noutput: o\n";
  const RunConfig by_default = load(start + "objective: {rule: lisa}\n");
  const RunConfig given =
      load(start + "objective: {rule: lisa, lisa: {align_steps: 2, task_steps: 3, rho: 0.01}}\n");

  EXPECT_EQ(by_default.objective.lisa, (LisaConfig{100, 900, 1.0}));
  EXPECT_EQ(given.objective.lisa, (LisaConfig{2, 3, 0.01}));
  EXPECT_FALSE(load(start).objective.lisa);
}

TEST_F(ConfigTest, EveryKeyReachesItsMember) {
  const RunConfig config = load(kFull);

  EXPECT_EQ(config.model.path, "models/tiny");
  EXPECT_EQ(config.model.config, "");
  EXPECT_EQ(config.model.dtype, ComputeDtype::bfloat16);
  ASSERT_TRUE(config.model.lora);
  EXPECT_EQ(config.model.lora->rank, 4);
  EXPECT_EQ(config.model.lora->alpha, 32);
  EXPECT_EQ(config.model.lora->dropout, 0.1);
  EXPECT_EQ(config.model.lora->targets, (std::vector<std::string>{"q_proj", "down_proj"}));
  EXPECT_TRUE(config.model.trainable.empty()) << "with lora only the adapters are trained";
  EXPECT_EQ(config.data.task, "task.safetensors");
  EXPECT_EQ(config.data.align, "align.safetensors");
  EXPECT_EQ(config.objective.rule, Rule::cagrad);
  EXPECT_EQ(config.objective.rho, 0.5);
  EXPECT_EQ(config.objective.cagrad_c, 0.25);
  EXPECT_EQ(config.objective.surgery, Surgery::block);
  EXPECT_EQ(config.objective.align_loss, AlignLoss::sft);
  EXPECT_EQ(config.objective.kl_positions, KlPositions::all);
  EXPECT_EQ(config.objective.gradients, GradientMode::two_pass);
  EXPECT_EQ(config.objective.align_every, 4);
  EXPECT_EQ(config.objective.gate, 2.5);
  EXPECT_TRUE(config.objective.gram_per_block);
  EXPECT_EQ(config.batch.task_sequences, 2);
  EXPECT_EQ(config.batch.align_sequences, 3);
  EXPECT_EQ(config.batch.max_tokens_per_rank, 512);
  EXPECT_EQ(config.optimizer.lr, 2e-5);
  EXPECT_EQ(config.optimizer.betas, (std::array<double, 2>{0.8, 0.95}));
  EXPECT_EQ(config.optimizer.eps, 1e-6);
  EXPECT_EQ(config.optimizer.weight_decay, 0.1);
  EXPECT_EQ(config.optimizer.clip_norm, 0);
  EXPECT_EQ(config.schedule.kind, ScheduleKind::cosine);
  EXPECT_EQ(config.schedule.warmup_steps, 7);
  EXPECT_FALSE(config.train.epochs);
  EXPECT_EQ(config.train.steps, 11);
  EXPECT_EQ(config.train.seed, std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(config.train.max_skipped_steps, 9);
  EXPECT_EQ(config.parallel.device, Device::cuda);
  EXPECT_EQ(config.parallel.shards, 2);
  EXPECT_EQ(config.parallel.recompute, Recompute::block);
  EXPECT_EQ(config.parallel.reduce_dtype, ComputeDtype::bfloat16);
  EXPECT_EQ(config.parallel.frozen, FrozenWeights::replicated);
  ASSERT_EQ(config.probe.size(), 2u);
  EXPECT_EQ(config.probe[0].name, "refusal");
  EXPECT_EQ(config.probe[0].file, "refusal.safetensors");
  EXPECT_EQ(config.probe[0].every_steps, 25);
  EXPECT_EQ(config.probe[1], (ProbeConfig{"utility-2", "utility.safetensors", 0}));
  EXPECT_EQ(config.checkpoint.every_steps, 100);
  EXPECT_EQ(config.checkpoint.keep_last, 5);
  EXPECT_EQ(config.checkpoint.keep_every, 1000);
  EXPECT_EQ(config.output, "runs/full");
}

// That no key is without a meaning is checked by config_schema() itself.
TEST_F(ConfigTest, EveryMeaningIsOfAKeyAndInTheSameOrder) {
  std::vector<std::string> meanings;
  for (const KeyMeaning& meaning : key_meanings()) meanings.emplace_back(meaning.key);
  std::vector<std::string> keys;
  for (const std::string& key : list_keys<RunConfig>("").all) {
    keys.push_back(key);
    if (key != "probe") continue;  // no dotted path leads below a list
    for (const std::string& below : list_keys<ProbeConfig>("probe.").all) keys.push_back(below);
  }
  EXPECT_EQ(meanings, keys);
  EXPECT_NE(config_schema().find("\"exclusiveMinimum\": 0"), std::string::npos);
}

TEST_F(ConfigTest, EveryKeyThatIsGivenHasAValueByItsDottedName) {
  const std::map<std::string, std::string> values = config_values(load(kFull));

  for (const auto& [key, value] :
       std::map<std::string, std::string>{{"model.lora.targets", "[q_proj, down_proj]"},
                                          {"objective.rule", "cagrad"},
                                          {"optimizer.betas", "[0.8, 0.95]"},
                                          {"train.seed", "18446744073709551615"},
                                          {"probe[0].every_steps", "25"},
                                          {"probe[1].name", "utility-2"},
                                          {"checkpoint.keep_every", "1000"},
                                          {"output", "runs/full"}}) {
    ASSERT_TRUE(values.contains(key)) << key;
    EXPECT_EQ(values.at(key), value) << key;
  }
  EXPECT_FALSE(values.contains("train.epochs")) << "steps are given instead";
  EXPECT_FALSE(values.contains("model.trainable"));
}

TEST_F(ConfigTest, KeysThatAreNotGivenKeepTheirDefaults) {
  RunConfig expected;
  expected.model.path = "models/tiny";
  expected.data = {"task.safetensors", "align.safetensors"};
  expected.train.epochs = 1;
  expected.output = "runs/minimal";

  EXPECT_EQ(load(kMinimal), expected);
}

TEST_F(ConfigTest, SectionWithEveryKeyCommentedOutMeansDefaults) {
  EXPECT_EQ(load(std::string(kMinimal) + "checkpoint:\n  # every_steps: 5\nprobe:\n"),
            load(kMinimal));
}

TEST_F(ConfigTest, YamlOfAConfigReadsBackToAnEqualOne) {
  const std::string sft =
      "model: {config: c.json, trainable: ['model\\.layers\\..*', x]}\n"
      "objective: {rule: sft}\nparallel: {shards: all, device: auto}\n"
      "output: o\n";
  for (const std::string& text : {std::string(kFull), std::string(kMinimal), sft}) {
    const RunConfig config = load(text);
    const std::string yaml = to_yaml(config);

    const RunConfig again = load(yaml);

    EXPECT_EQ(again, config) << yaml;
    EXPECT_EQ(to_yaml(again), yaml);
  }
}

TEST_F(ConfigTest, OddTextsAndNumbersSurviveTheRoundTrip) {
  RunConfig config = load(kMinimal);
  config.optimizer.lr = 1.0 / 3;
  config.optimizer.eps = std::numeric_limits<double>::denorm_min();
  config.optimizer.weight_decay = 1e300;
  for (const char* text :
       {"null",       "~",         "true", "8",   "a: b", "a #b", "- x",  "[x",
        "{x",         "*x",        "&x",   "!x",  "'",    "\"",   "a\\b", " padded ",
        "two\nlines", "tab\there", "%x",   "ünï", "@x",   "`x",   "|",    ">",
        "?",          ":",         ",",    "x:",  "<<",   "---",  "..."}) {
    config.model.path = text;
    config.model.trainable = {text == std::string_view("[x") ? "x" : ".*", "a, b"};

    EXPECT_EQ(load(to_yaml(config)), config) << to_yaml(config);
  }
}

TEST_F(ConfigTest, TextsThatYamlCannotWriteAreRefused) {
  const auto refused = [&](const std::string& text) {
    return error_of("model: {path: m}\ndata: {align: a}\noutput: " + text + "\n");
  };
  EXPECT_EQ(refused("a\xff"),
            "config.yaml:3: got the byte 0xff, which is not UTF-8; save the file as UTF-8");
  // Cut short, spelled longer than need be, half of a pair, above U+10FFFF.
  for (const char* bad : {"\xc3", "\xc0\xaf", "\xe0\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80"}) {
    EXPECT_NE(refused(bad).find("not UTF-8"), std::string::npos) << refused(bad);
  }
  EXPECT_NE(
      error_of(kMinimal, {"output=a\xff"}).find("config.yaml: --set output: got the byte 0xff"),
      std::string::npos);

  EXPECT_EQ(refused("\"a\\0b\""),
            "config.yaml:3: output: got a text with U+0000 in it, which no name has");
  for (const char* bad : {"\\uffff", "\\ufdd0", "\\U0010fffe"}) {
    EXPECT_NE(refused("\"" + std::string(bad) + "\"").find("which no name has"), std::string::npos);
  }
  for (const char* good : {"\xc3\xbc", "\xed\x9f\xbf", "\xef\xbf\xbc", "\xf4\x8f\xbf\xbd"}) {
    EXPECT_EQ(refused(good), "no error");
  }
}

TEST_F(ConfigTest, MessagesShowWhatATerminalWouldObeyAsText) {
  const std::string control = "\"a\\e[2J\"";  // clears a screen
  const std::string unknown = error_of(kMinimal + control + ": 1\n");
  EXPECT_EQ(unknown.rfind("config.yaml:7: a\\x1b[2J: no such key", 0), 0u) << unknown;
  EXPECT_EQ(error_of("model: {path: m, trainable: [\"(\\e[2J\"]}\noutput: o\n")
                .rfind("config.yaml:1: model.trainable[0]: got \"(\\x1b[2J\"", 0),
            0u);
  EXPECT_NE(error_of("train: {seed: \"-\\e\"}\noutput: o\n").find("got -\\x1b, must be"),
            std::string::npos);
  EXPECT_NE(error_of("output: \"\\\x1b\"\n").find("\\x1b"), std::string::npos);
}

TEST_F(ConfigTest, AFileCannotAskForMuchMoreThanItIs) {
  const auto with_expressions = [&](const std::string& list) {
    return error_of("model: {path: m, trainable: [" + list + "]}\ndata: {align: a}\noutput: o\n");
  };
  // Each bracket is a level of recursion in std::regex: this many would overflow its stack.
  const size_t deep = 60000;
  EXPECT_EQ(
      with_expressions("'" + std::string(deep, '(') + std::string(deep, ')') + "'"),
      "config.yaml:1: model.trainable[0]: got an expression of 120000 characters, at most 256 "
      "are allowed");
  EXPECT_EQ(with_expressions("'" + std::string(128, '(') + std::string(128, ')') + "'"),
            "no error");
  // As a back-reference it overflows an int of std::regex.
  EXPECT_EQ(
      with_expressions("'a\\18446744073709551615'"),
      "config.yaml:1: model.trainable[0]: got \"a\\\\18446744073709551615\", in which a number "
      "has more than 5 digits");
  // Each of these would take megabytes.
  std::string many;
  for (int i = 0; i < 65; ++i) many += "'a{9999}',";
  EXPECT_EQ(with_expressions(many),
            "config.yaml:1: model.trainable: got a list of 65, at most 64 are allowed");

  std::string keys;
  for (int i = 0; i < 1001; ++i) keys += fmt::format("k{}: 1\n", i);
  EXPECT_EQ(error_of(keys), "config.yaml:1001: k1000: got more than 1000 entries side by side");
}

TEST_F(ConfigTest, WrittenNumbersAreShortAndNumbersToYaml11) {
  RunConfig config = load(kMinimal);
  config.optimizer.lr = 1e-5;
  config.optimizer.weight_decay = 0.1;

  const std::string yaml = to_yaml(config);

  EXPECT_NE(yaml.find("lr: 1.0e-05\n"), std::string::npos) << yaml;  // 1e-05 is a text to PyYAML
  EXPECT_NE(yaml.find("weight_decay: 0.1\n"), std::string::npos) << yaml;
  EXPECT_NE(yaml.find("clip_norm: 1.0\n"), std::string::npos) << yaml;
  EXPECT_NE(yaml.find("shards: all\n"), std::string::npos) << yaml;
  EXPECT_NE(yaml.find("device: auto\n"), std::string::npos) << yaml;
}

TEST_F(ConfigTest, RuleSftNeedsNoAlignmentAndThenHasNone) {
  const std::string text = "model: {path: m}\ndata: {task: t}\nobjective: {rule: sft}\noutput: o\n";

  EXPECT_EQ(load(text).batch.align_sequences, 0);
  EXPECT_EQ(load(text, {"batch.align_sequences=0"}).batch.align_sequences, 0);
  EXPECT_EQ(load(text, {"data.align=a"}).batch.align_sequences, 8) << "measured, not acted on";
  EXPECT_EQ(load(text, {"data.align=a", "batch.align_sequences=0"}).batch.align_sequences, 0);
}

TEST_F(ConfigTest, AConfigForEvaluationNeedsNoData) {
  const std::string text = "model: {path: m}\nprobe: [{name: p, file: f}]\noutput: o\n";

  EXPECT_EQ(load(text).objective.rule, Rule::safegrad);
  EXPECT_NE(error_of(text, {"data.task=t"}).find("data.align: missing"), std::string::npos);
}

TEST_F(ConfigTest, OverridesChangeAddAndTakeOut) {
  EXPECT_EQ(load(kFull, {"optimizer.lr=3e-4"}).optimizer.lr, 3e-4);
  EXPECT_EQ(load(kFull, {"objective.rule=sft"}).objective.rule, Rule::sft);
  EXPECT_EQ(load(kFull, {"output=a=b"}).output, "a=b");
  EXPECT_EQ(load(kFull, {"optimizer.betas=[0.5, 0.75]"}).optimizer.betas[1], 0.75);
  EXPECT_EQ(load(kFull, {"train.seed=1", "train.seed=2"}).train.seed, 2u) << "the last one wins";
  EXPECT_EQ(load(kFull, {"probe=[{name: a, file: b}]"}).probe,
            (std::vector<ProbeConfig>{{"a", "b", 0}}));
  EXPECT_TRUE(load(kFull, {"probe=null"}).probe.empty());
  EXPECT_TRUE(load(kFull, {"probe=[]"}).probe.empty());
  EXPECT_EQ(load(kFull, {"optimizer.lr=null"}).optimizer.lr, 1e-5) << "back to the default";
  EXPECT_EQ(load(kFull, {"train.steps=null", "train.epochs=3"}).train.epochs, 3);
}

TEST_F(ConfigTest, OverridesMakeAndRemoveLora) {
  const RunConfig made = load(kMinimal, {"model.lora.rank=4"});
  ASSERT_TRUE(made.model.lora);
  EXPECT_EQ(made.model.lora->rank, 4);
  EXPECT_EQ(made.model.lora->targets, LoraConfig().targets);

  const RunConfig removed = load(kFull, {"model.lora=null"});
  EXPECT_FALSE(removed.model.lora);
  EXPECT_EQ(removed.model.trainable, std::vector<std::string>{".*"});

  const RunConfig replaced = load(kFull, {"model.lora=null", "model.lora.rank=2"});
  ASSERT_TRUE(replaced.model.lora);
  EXPECT_EQ(replaced.model.lora->rank, 2);
  EXPECT_EQ(replaced.model.lora->alpha, LoraConfig().alpha) << "what was taken out stays out";
}

TEST_F(ConfigTest, FilesThatAreNoConfigAreRefused) {
  EXPECT_EQ(error_of(""),
            "config.yaml: the file is empty; a config is a map of sections such as model");
  EXPECT_EQ(error_of("# nothing\n"), error_of(""));
  EXPECT_EQ(error_of("- a\n- b\n"), "config.yaml:1: got a list, expected a map of sections");
  EXPECT_EQ(error_of("\nhello\n"), "config.yaml:2: got \"hello\", expected a map of sections");
  EXPECT_NE(error_of(std::string(kMinimal) + "---\noutput: x\n").find("second YAML document"),
            std::string::npos);
  EXPECT_EQ(error_of("a: 1\n b: [\n").rfind("config.yaml:2:3: not valid YAML: ", 0), 0u)
      << error_of("a: 1\n b: [\n");
  EXPECT_NE(error_of("model:\n  path: m\n   dtype: x\n").find("; look at the indentation: "),
            std::string::npos);
  EXPECT_NE(error_of("model:\n  path: m\n\tdtype: x\n").find("; line 3 is indented with a tab, "),
            std::string::npos)
      << error_of("model:\n  path: m\n\tdtype: x\n");
  EXPECT_NE(error_of("model: {path: m}\ndata: {align: a}\noutput: \"open\n").find("not valid YAML"),
            std::string::npos)
      << "yaml-cpp itself would end the quote silently";
  EXPECT_NE(error_of(std::string(100000, '[')), "no error");
  EXPECT_NE(error_of(std::string(100000, '{')), "no error");
  EXPECT_NE(error_of(std::string("\0\xff\xfe\x01", 4)), "no error");
  EXPECT_THROW(load_config(folder_ / "absent.yaml", {}), ConfigError);
  EXPECT_THROW(load_config(folder_.path(), {}), ConfigError);
}

TEST_F(ConfigTest, AllMistakesAreToldAtOnce) {
  const std::string wrong = error_of(std::string(kMinimal) +
                                         "objective: {rhoo: 1, rule: sgd}\ntrain: {steps: 0}\n"
                                         "probe:\n- {name: a, flie: b}\n",
                                     {"optimizer.lr=fast"});
  std::vector<std::string> lines;
  std::istringstream stream(wrong);
  for (std::string line; std::getline(stream, line);) lines.push_back(line.substr(0, 60));
  for (std::string& line : lines) {
    if (const size_t at = line.find(file_); at != std::string::npos)
      line.replace(at, file_.size(), "config.yaml");
  }
  ASSERT_EQ(lines.size(), 7u) << wrong;
  EXPECT_EQ(lines[0], "config.yaml: 6 mistakes:");
  for (const char* told : {":7: objective.rhoo: no such key", ":7: objective.rule: got \"sgd\"",
                           ": --set optimizer.lr: got \"fast\"", ":8: train.steps: got 0",
                           ":10: probe[0].flie: no such key", ":10: probe[0].file: missing"}) {
    EXPECT_NE(wrong.find(file_ + told), std::string::npos) << told << " is not in\n" << wrong;
  }
}

TEST_F(ConfigTest, ContradictionsAreToldAtOnceWhereEachKeyIsRight) {
  const std::string both = "model: {path: a, config: b}\ntrain: {steps: 1, epochs: 1}\noutput: c\n";
  const std::string contradictions = error_of(both);
  EXPECT_EQ(contradictions.find("config.yaml: 2 mistakes:\n"), 0u) << contradictions;
  EXPECT_NE(contradictions.find("model.config"), std::string::npos) << contradictions;
  EXPECT_NE(contradictions.find("train.epochs"), std::string::npos) << contradictions;
  const std::string key = error_of(both + "batch: {task_sequences: 0}\n");
  EXPECT_EQ(key.find("config.yaml:4: batch.task_sequences: got 0"), 0u) << key;
  EXPECT_EQ(key.find('\n'), std::string::npos) << "a contradiction may follow from the mistake";
}

TEST_F(ConfigTest, ThePlaceOfAKeyIsWhereItIsGiven) {
  const std::string text = std::string(kMinimal) + "probe:\n- {name: a, file: b}\n";
  load(text);
  const std::vector<std::string> overrides = {"data.align=other"};
  EXPECT_EQ(place_of(file_, overrides, "data.task"), file_ + ":4: data.task");
  EXPECT_EQ(place_of(file_, overrides, "data.align"), file_ + ": --set data.align");
  EXPECT_EQ(place_of(file_, overrides, "probe[0].file"), file_ + ":8: probe[0].file");
}

TEST_F(ConfigTest, ExitCodeSaysTheMistakeIsInTheInput) {
  try {
    load("nonsense: 1\n");
    FAIL() << "expected a ConfigError";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), 1);
  }
}

TEST(EnumNames, EveryEnumeratorHasItsName) {
  EXPECT_EQ(name_of(ComputeDtype::bfloat16), "bfloat16");
  EXPECT_EQ(name_of(Rule::sft), "sft");
  EXPECT_EQ(name_of(Rule::weighted_sum), "weighted_sum");
  EXPECT_EQ(name_of(Rule::safegrad), "safegrad");
  EXPECT_EQ(name_of(Rule::agem), "agem");
  EXPECT_EQ(name_of(Rule::pcgrad), "pcgrad");
  EXPECT_EQ(name_of(Rule::mgda), "mgda");
  EXPECT_EQ(name_of(Rule::cagrad), "cagrad");
  EXPECT_EQ(name_of(Rule::ogpsa), "ogpsa");
  EXPECT_EQ(name_of(Rule::lisa), "lisa");
  EXPECT_EQ(name_of(AlignLoss::sft), "sft");
  EXPECT_EQ(name_of(KlPositions::all), "all");
  EXPECT_EQ(name_of(ScheduleKind::linear), "linear");
  EXPECT_EQ(name_of(ScheduleKind::cosine), "cosine");
  EXPECT_EQ(name_of(Device::automatic), "auto");
  EXPECT_EQ(name_of(Device::cuda), "cuda");
  EXPECT_EQ(name_of(Recompute::block), "block");
  EXPECT_EQ(name_of(GradientMode::two_pass), "two_pass");
  EXPECT_EQ(name_of(FrozenWeights::replicated), "replicated");
}

TEST(NearestKey, SwappedLettersAreOneMistake) {
  const std::vector<std::string> own = {"lr", "eps"};

  EXPECT_EQ(nearest_key("optimizer.", "rl", own), "optimizer.lr");
  EXPECT_EQ(nearest_key("optimizer.", "esp", own), "optimizer.eps");
  EXPECT_EQ(nearest_key("optimizer.", "zz", own), "");
}

}  // namespace
}  // namespace safegrad
