#include "dist/tiny_job.h"

#include <filesystem>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <unistd.h>

#include "core/random.h"
#include "core/safetensors.h"

namespace safegrad::testing {
namespace {

class Collector : public ModelSink {
 public:
  void begin(const std::vector<ExportEntry>&) override {}
  void put(const std::string& name, const at::Tensor& value) override {
    const at::Tensor flat = value.to(at::kCPU, at::kFloat).contiguous();
    tensors[name].assign(flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel());
  }
  void finish() override {}
  std::map<std::string, std::vector<float>> tensors;
};

template <typename T>
std::span<const std::byte> bytes(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

}  // namespace

void write_token_file(const std::string& path, const std::vector<Sample>& samples, bool choices) {
  std::vector<int32_t> tokens, group, choice;
  std::vector<uint8_t> mask;
  std::vector<int64_t> offsets = {0};
  for (const Sample& sample : samples) {
    for (size_t t = 0; t < sample.tokens.size(); ++t) {
      tokens.push_back(static_cast<int32_t>(sample.tokens[t]));
      mask.push_back(t >= sample.prompt_length);
    }
    offsets.push_back(static_cast<int64_t>(tokens.size()));
    group.push_back(sample.group);
    choice.push_back(sample.choice);
  }
  const auto n = static_cast<int64_t>(samples.size());
  std::vector<SafetensorsWriter::Entry> entries = {
      {"tokens", Dtype::i32, {static_cast<int64_t>(tokens.size())}},
      {"loss_mask", Dtype::u8, {static_cast<int64_t>(mask.size())}},
      {"offsets", Dtype::i64, {n + 1}}};
  std::map<std::string, std::string> metadata = {{"format", "safegrad.tokens/1"}};
  if (choices) {
    entries.push_back({"group", Dtype::i32, {n}});
    entries.push_back({"choice", Dtype::i32, {n}});
    metadata["classes"] = R"(["left", "right"])";
  }
  SafetensorsWriter writer(path, entries, metadata);
  writer.append(bytes(tokens));
  writer.append(bytes(mask));
  writer.append(bytes(offsets));
  if (choices) {
    writer.append(bytes(group));
    writer.append(bytes(choice));
  }
  writer.finish();
}

void write_random_token_file(const std::string& path, int64_t sequences, int64_t vocab_size,
                             uint64_t seed, bool choices) {
  const Philox random(seed);
  auto draw = [&](uint64_t i, uint64_t j) { return random(i, j)[0]; };
  std::vector<Sample> samples;
  for (int64_t i = 0; i < sequences; ++i) {
    const auto prompt =
        static_cast<uint64_t>(choices ? i / 3 : i);  // candidates share their prompt
    const uint64_t prompt_length = 2 + draw(prompt, 1) % 25;
    const uint64_t response = choices ? 1 + static_cast<uint64_t>(i % 3) : 1 + draw(prompt, 2) % 13;
    Sample sample{{}, prompt_length, static_cast<int32_t>(i / 3), i % 3 == 0};
    for (uint64_t t = 0; t < prompt_length + response; ++t) {
      const uint64_t stream = t >= prompt_length ? 1000 + static_cast<uint64_t>(i) : prompt;
      sample.tokens.push_back(
          static_cast<int64_t>(draw(stream, 10 + t) % static_cast<uint64_t>(vocab_size)));
    }
    samples.push_back(std::move(sample));
  }
  write_token_file(path, samples, choices);
}

SharedFolder::SharedFolder(dist::Communicator& world) : owner_(world.rank() == 0) {
  std::string path;
  if (owner_) {
    std::string pattern = std::filesystem::temp_directory_path() / "safegrad-test-XXXXXX";
    path = mkdtemp(pattern.data());
  }
  path_ = world.broadcast(path, 0);
}

SharedFolder::~SharedFolder() {
  std::error_code ignored;
  if (owner_) std::filesystem::remove_all(path_, ignored);
}

RunConfig tiny_config(const std::string& gold, const std::string& folder) {
  RunConfig config;
  config.model.path = std::string(SAFEGRAD_SOURCE_DIR) + "/tests/gold/data/" + gold;
  config.data.task = folder + "/task.safetensors";
  config.data.align = folder + "/align.safetensors";
  config.batch.task_sequences = 5;
  config.batch.align_sequences = 3;
  config.optimizer.lr = 1e-3;
  config.train.steps = 20;
  config.output = folder + "/run";
  return config;
}

RunConfig with_lora(RunConfig config) {
  config.model.trainable.clear();
  config.model.lora = LoraConfig{
      .rank = 3, .alpha = 9, .targets = {"q_proj", "v_proj", "o_proj", "up_proj", "down_proj"}};
  config.optimizer.lr = 1e-2;
  return config;
}

void write_tiny_data(const RunConfig& config) {
  const int64_t vocab = models::read_decoder_config(config.model.path + "/config.json").vocab_size;
  write_random_token_file(config.data.task, 11, vocab, 1, false);
  write_random_token_file(config.data.align, 7, vocab, 2, false);
  for (const ProbeConfig& probe : config.probe)
    write_random_token_file(probe.file, 12, vocab, 3, probe.name == "choices");
}

TinyJob::TinyJob(const RunConfig& run, std::unique_ptr<dist::Communicator> ranks,
                 const Backend& device)
    : config(run),
      model(models::open_model(config.model, config.train.seed, device)),
      mesh(std::move(ranks), config.parallel.shards) {
  std::vector<std::string> warnings;
  const auto data = dist::open_data(config, *model.decoder, "", warnings);
  trainer = std::make_unique<dist::Trainer>(config, *model.decoder, *model.weights, data, mesh);
}

std::vector<StepRecord> TinyJob::run(int64_t first, int64_t last) {
  std::vector<StepRecord> records;
  for (int64_t i = first; i < last; ++i) records.push_back(trainer->step(i));
  return records;
}

std::map<std::string, std::vector<float>> TinyJob::tensors() {
  Collector collector;  // on every rank: each sees the gathered units
  trainer->export_model(false, &collector);
  return std::move(collector.tensors);
}

std::vector<float> TinyJob::weights() {
  std::vector<float> all;
  for (const auto& [name, values] : tensors()) all.insert(all.end(), values.begin(), values.end());
  return all;
}

at::Tensor logits_of(dist::Engine& engine, const std::vector<int64_t>& text) {
  PackedBatch batch;
  batch.tokens = at::tensor(at::ArrayRef<int64_t>(text), at::kLong);
  batch.positions = batch.scored = at::arange(batch.tokens.size(0), at::kLong);
  batch.cu_seqlens = batch.segments = batch.scored_segments = {0, batch.tokens.size(0)};
  batch.longest = batch.positions_end = batch.size();
  engine.begin_step();
  batch.boundaries = at::tensor(at::ArrayRef<int64_t>(batch.cu_seqlens), at::kInt);
  const at::Tensor h = engine.hidden(upload(batch, engine.backend()));
  at::Tensor logits;
  engine.with_head([&](Parameter& head, Parameter&) { logits = at::mm(h, head.value.t()).cpu(); });
  engine.release_resident();
  return logits;
}

}  // namespace safegrad::testing
