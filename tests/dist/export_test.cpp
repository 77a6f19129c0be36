// export_test.cpp: what a run leaves behind is the model that was trained.
#include <filesystem>
#include <fstream>
#include <set>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "dist/rank_main.h"
#include "dist/tiny_job.h"
#include "models/hf_export.h"

namespace safegrad::testing {
namespace {

namespace fs = std::filesystem;

const std::vector<int64_t> kText = {5, 3, 17, 11, 2, 30, 8};

class Exports : public ::testing::Test {
 protected:
  Exports() : all_(world()), folder_(*all_) {}
  void TearDown() override { all_->barrier(); }

  RunConfig config(const std::string& gold) {
    RunConfig c = tiny_config(gold, folder_.path());
    if (all_->rank() == 0) write_tiny_data(c);
    all_->barrier();
    return c;
  }
  std::string folder() const { return folder_.path() + "/run/model"; }

  /// Trains three steps, writes the model and returns its logits.
  at::Tensor train_and_write(const RunConfig& c, bool merged = false,
                             int64_t file_bytes = int64_t{1} << 30) {
    TinyJob job(c, world());
    job.run(0, 3);
    models::ExportTarget target;
    target.folder = folder();
    target.base_folder = c.model.path;
    target.file_bytes = file_bytes;
    if (!merged) target.adapter = c.model.lora;
    models::HfExport files(target);
    job.trainer->export_model(merged, all_->rank() == 0 ? &files : nullptr);
    return logits_of(job.trainer->engine(), kText);
  }
  at::Tensor read_again() {
    ModelSection section;
    section.path = folder();
    const auto model = models::open_model(section, 0, backend());
    dist::Mesh mesh(world(), 0);
    dist::Engine engine(*model.decoder, mesh, {});
    engine.load(*model.weights);
    return logits_of(engine, kText);
  }
  std::set<std::string> files() const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder()))
      names.insert(entry.path().filename().string());
    return names;
  }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
};

constexpr int64_t kSmallFile = 20'000;
const LoraConfig kLora{
    .rank = 4, .alpha = 8, .dropout = 0, .targets = {"q_proj", "o_proj", "up_proj"}};

TEST_F(Exports, AWholeModelComesBackToTheBit) {
  for (const char* gold : {"llama3", "llama_tied", "qwen2", "qwen3"}) {
    const RunConfig c = config(gold);
    const at::Tensor trained = train_and_write(c);

    EXPECT_TRUE(read_again().equal(trained)) << gold;
    all_->barrier();
  }
}

TEST_F(Exports, AModelInSeveralFilesComesBackToTheBit) {
  const at::Tensor trained = train_and_write(config("qwen3"), false, kSmallFile);

  EXPECT_TRUE(read_again().equal(trained));
  EXPECT_TRUE(files().contains("model.safetensors.index.json"));
  EXPECT_GT(files().size(), 4u) << "config, index and several files";
}

TEST_F(Exports, AnAdapterComesBackOnItsBaseModel) {
  RunConfig c = config("qwen2");
  c.model.lora = kLora;
  c.model.trainable.clear();
  c.optimizer.lr = 1e-2;
  const at::Tensor trained = train_and_write(c);

  // Read, it is merged: W + s B A in place of W x + s B (A x).
  EXPECT_LT((read_again() - trained).abs().max().item<double>(), 1e-5);
  EXPECT_TRUE(files().contains("adapter_model.safetensors"));
  EXPECT_FALSE(files().contains("config.json")) << "peft would take the folder for a whole model";
}

TEST_F(Exports, AMergedModelIsTheAdaptedOne) {
  RunConfig c = config("qwen2");
  c.model.lora = kLora;
  c.model.trainable.clear();
  c.optimizer.lr = 1e-2;
  TinyJob untrained(c, world());
  const at::Tensor start = logits_of(untrained.trainer->engine(), kText);
  const at::Tensor trained = train_and_write(c, true);

  ASSERT_GT((trained - start).abs().max().item<double>(), 1e-3) << "the adapters must matter";
  EXPECT_LT((read_again() - trained).abs().max().item<double>(), 1e-5);
}

TEST_F(Exports, NothingOfAnEarlierExportIsLeftToBeMistaken) {
  const RunConfig c = config("qwen3");
  train_and_write(c, false, kSmallFile);
  if (all_->rank() == 0) std::ofstream(folder() + "/model-before.safetensors") << "mine";
  all_->barrier();
  RunConfig adapted = c;
  adapted.model.lora = kLora;
  adapted.model.trainable.clear();
  train_and_write(adapted);
  EXPECT_EQ(files(), (std::set<std::string>{"adapter_config.json", "adapter_model.safetensors",
                                            "model-before.safetensors"}));
  all_->barrier();
  const at::Tensor trained = train_and_write(c);

  EXPECT_EQ(files(), (std::set<std::string>{"config.json", "model-before.safetensors",
                                            "model.safetensors"}));
  EXPECT_TRUE(read_again().equal(trained));
  EXPECT_FALSE(fs::exists(folder() + ".partial"));
}

}  // namespace
}  // namespace safegrad::testing
