// audit_test.cpp: a sample's score is its own gradient's inner product with the alignment gradient.
#include "dist/audit.h"

#include <cmath>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "dist/job_failed.h"
#include "dist/rank_main.h"
#include "dist/tiny_job.h"

namespace safegrad::testing {
namespace {

/// A training job of a few steps, whose engine then audits its task data: with the gradient of the
/// alignment loss where there is one, else with the alignment set's cross-entropy. With LoRA those
/// steps matter: before them B is zero, and so is the gradient of A.
class AuditedJob {
 public:
  explicit AuditedJob(const RunConfig& config, int64_t steps = 3)
      : job_(config, world()),
        task_file_(config.data.task, {}, warnings_),
        align_file_(config.data.align, {}, warnings_),
        k_(config.batch.align_sequences > 0 ? 1 : 0),
        task_{&task_file_, false, {}},
        align_(k_ == 1 ? job_.trainer->objective(1) : ObjectiveData{&align_file_, false, {}}) {
    job_.run(0, steps);
  }

  dist::Audit audit() {
    return dist::audit(engine(), mesh(), task_, align_, k_, job_.config.batch.max_tokens_per_rank,
                       {});
  }
  dist::Engine& engine() { return job_.trainer->engine(); }
  dist::Mesh& mesh() { return job_.mesh; }
  TinyJob& job() { return job_; }
  const TokenFile& task() const { return task_file_; }
  const TokenFile& align() const { return align_file_; }

  /// Summed gradients through the training engine: this rank's shards of every unit.
  std::vector<at::Tensor> task_gradient(const std::vector<int64_t>& samples) {
    return gradient(task_, 0, samples);
  }
  std::vector<at::Tensor> align_gradient() { return gradient(align_, k_, all_of(align_file_)); }
  static std::vector<int64_t> all_of(const TokenFile& file) {
    std::vector<int64_t> samples;
    for (int64_t i = 0; i < file.size(); ++i) samples.push_back(i);
    return samples;
  }
  /// In float64, over the ranks of a shard group.
  double dot(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
    double own = 0, sum = 0;
    for (size_t i = 0; i < a.size(); ++i) own += at::dot(a[i], b[i]).item<double>();
    for (double part : dist::all_gather_doubles(mesh().shard_group(), std::span(&own, 1)))
      sum += part;
    return sum;
  }

 private:
  // Each rank runs every so manyth sample.
  std::vector<at::Tensor> gradient(const ObjectiveData& data, size_t k,
                                   const std::vector<int64_t>& samples) {
    std::vector<Draw> own;
    for (size_t i = 0; i < samples.size(); ++i) {
      if (static_cast<int>(i) % mesh().world().size() == mesh().world().rank())
        own.push_back({k, samples[i]});
    }
    dist::PassSums sums = engine().zero_sums();
    const std::vector<ObjectiveData> objectives(k + 1, data);
    engine().begin_step();
    engine().forward_backward(upload(pack(own, objectives, {}), engine().backend()), {k}, true,
                              sums);
    engine().end_step();
    std::vector<at::Tensor> shards;
    for (const dist::ShardedUnit& unit : engine().units()) {
      if (unit.trains()) shards.push_back(unit.gradient_shard(k).to(at::kDouble));
    }
    return shards;
  }

  std::vector<std::string> warnings_;
  TinyJob job_;
  TokenFile task_file_, align_file_;
  size_t k_;
  ObjectiveData task_, align_;
};

class Audits : public ::testing::Test {
 protected:
  Audits() : all_(world()), folder_(*all_) {}
  void TearDown() override { all_->barrier(); }

  RunConfig plain(const std::string& gold) const {
    RunConfig c = tiny_config(gold, folder_.path());
    c.objective.rule = Rule::sft;
    c.batch.align_sequences = 0;
    c.batch.max_tokens_per_rank = 67;  // several micro-batches
    return c;
  }
  RunConfig lora() const { return with_lora(plain("qwen2")); }
  void write(const RunConfig& c) {
    all_->barrier();
    if (all_->rank() == 0) write_tiny_data(c);
    all_->barrier();
  }
  void for_each_sharding(RunConfig c, const std::function<void(const RunConfig&)>& body) {
    for (int64_t shards = 1; shards <= all_->size(); ++shards) {
      if (all_->size() % shards != 0) continue;
      SCOPED_TRACE("shards " + std::to_string(shards));
      c.parallel.shards = shards;
      body(c);
    }
  }
  // `tolerance` in units of |u|, since a score is a sum of products of either sign; of |a|
  // likewise.
  void expect_scores_of_own_gradients(const RunConfig& c, double tolerance) {
    AuditedJob job(c);
    const auto a = job.align_gradient();
    const double norm = std::sqrt(job.dot(a, a));
    ASSERT_GT(norm, 0);

    const dist::Audit audit = job.audit();

    ASSERT_EQ(audit.samples.size(), static_cast<size_t>(job.task().size()));
    const auto scored = static_cast<double>(job.align().total_scored());
    EXPECT_NEAR(audit.align_norm * scored / norm, 1.0, tolerance);
    double smallest = 1, largest = 0;
    for (int64_t i = 0; i < job.task().size(); ++i) {
      const auto u = job.task_gradient({i});
      const double n = static_cast<double>(job.task().scored(i)), length = std::sqrt(job.dot(u, u));
      EXPECT_NEAR(audit.samples[static_cast<size_t>(i)].score, job.dot(u, a) / norm / n,
                  tolerance * length / n)
          << "sample " << i;
      const double cosine = std::abs(job.dot(u, a)) / norm / length;
      smallest = std::min(smallest, cosine);
      largest = std::max(largest, cosine);
    }
    EXPECT_GT(largest, 3 * tolerance) << "the case must have samples that are not orthogonal";
    EXPECT_LT(smallest, 0.9 * largest) << "and samples that differ";
  }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
};

constexpr double kFloat = 1e-5;  // float32 products, summed in another order

TEST_F(Audits, FullWeightsWithEveryKindOfParameter) {
  // Heads of their own and tied ones, biases (qwen2), norms of heads (qwen3).
  for (const char* gold : {"llama3", "llama_tied", "qwen2", "qwen3"}) {
    SCOPED_TRACE(gold);
    write(plain(gold));
    for_each_sharding(plain(gold),
                      [&](const RunConfig& c) { expect_scores_of_own_gradients(c, kFloat); });
  }
}

TEST_F(Audits, LoraFactorsOfBothSides) {
  RunConfig c = lora();
  write(c);
  for (FrozenWeights frozen : {FrozenWeights::sharded, FrozenWeights::replicated}) {
    c.parallel.frozen = frozen;
    for_each_sharding(c,
                      [&](const RunConfig& run) { expect_scores_of_own_gradients(run, kFloat); });
  }
}

TEST_F(Audits, TheKlToTheStartModelGivesADirectionOnceTrainingHasLeftIt) {
  RunConfig c = lora();
  c.batch.align_sequences = 3;
  write(c);
  for_each_sharding(c, [&](const RunConfig& run) { expect_scores_of_own_gradients(run, kFloat); });
}

TEST_F(Audits, APartOfTheParametersAndRecomputedBlocks) {
  RunConfig c = plain("qwen2");
  c.parallel.recompute = Recompute::block;
  write(c);
  expect_scores_of_own_gradients(c, kFloat);
  c.model.trainable = {"model\\.norm\\.weight", ".*layers\\.1\\.mlp.*"};
  expect_scores_of_own_gradients(c, kFloat);
  c.model.trainable = {"model\\.norm\\.weight"};  // no block needs a backward
  expect_scores_of_own_gradients(c, kFloat);
}

TEST_F(Audits, Bfloat16IsAsPreciseAsItsProducts) {
  RunConfig c = plain("llama3");
  c.model.dtype = ComputeDtype::bfloat16;
  write(c);
  // 8 bits of mantissa in weights, activations, gradients and direction.
  expect_scores_of_own_gradients(c, 0.005);
}

TEST_F(Audits, ScoresAddUpToTheInnerProductOfTheWholeGradients) {
  for (const RunConfig& c : {plain("qwen2"), lora()}) {
    write(c);
    AuditedJob job(c);
    const dist::Audit audit = job.audit();
    const auto u = job.task_gradient(job.all_of(job.task()));
    const auto a = job.align_gradient();

    double sum = 0;
    for (size_t i = 0; i < audit.samples.size(); ++i)
      sum +=
          audit.samples[i].score * static_cast<double>(job.task().scored(static_cast<int64_t>(i)));

    const double norm = std::sqrt(job.dot(a, a)), length = std::sqrt(job.dot(u, u));
    EXPECT_NEAR(sum, job.dot(u, a) / norm, kFloat * length);
  }
}

// A step that draws all of both sets records u·a, for either alignment loss.
TEST_F(Audits, ScoresAddUpToTheInnerProductInAStepsGramMatrix) {
  for (AlignLoss loss : {AlignLoss::sft, AlignLoss::kl}) {
    RunConfig c = plain("llama3");
    c.batch.task_sequences = 11;
    c.batch.align_sequences = 7;
    c.objective.align_loss = loss;
    write(c);
    AuditedJob job(c);

    const dist::Audit audit = job.audit();
    const StepRecord record = job.job().run(3, 4).front();

    double score = 0, task_loss = 0;
    for (int64_t i = 0; i < job.task().size(); ++i) {
      const dist::AuditedSample& sample = audit.samples[static_cast<size_t>(i)];
      score += sample.score * static_cast<double>(job.task().scored(i));
      task_loss += sample.loss * static_cast<double>(job.task().scored(i));
    }
    const auto n = static_cast<double>(job.task().total_scored());
    ASSERT_TRUE(record.ua && record.aa && record.loss_align);
    ASSERT_GT(std::abs(*record.cosine), 0.01);
    EXPECT_NEAR(audit.align_norm, std::sqrt(*record.aa), kFloat * audit.align_norm);
    EXPECT_NEAR(audit.align_loss, *record.loss_align, 100 * kFloat * audit.align_loss)
        << "a KL near 0 is a difference";
    EXPECT_NEAR(score * audit.align_norm / n, *record.ua,
                kFloat * std::sqrt(record.uu * *record.aa));
    EXPECT_NEAR(task_loss / n, record.loss_task, kFloat * record.loss_task);
  }
}

TEST_F(Audits, AtTheStartModelTheKlHasNoDirection) {
  RunConfig c = plain("llama3");
  c.batch.align_sequences = 3;
  write(c);
  AuditedJob job(c, /*steps=*/0);
  // float32 may leave a gradient of rounding errors; a zero one ends the job, and one rank says so.
  try {
    EXPECT_LT(job.audit().align_norm, 1e-5);
  } catch (const dist::JobFailed& error) {
    const bool speaks = job.mesh().world().rank() == 0;
    EXPECT_EQ(std::string(error.what()).find("take more --steps") != std::string::npos, speaks)
        << error.what();
  }
}

TEST_F(Audits, ScoringReducesNoGradientsAndLeavesTheWeights) {
  RunConfig c = plain("llama3");
  write(c);
  AuditedJob job(c);
  job.align_gradient();
  job.engine().point_along_gradient(0, 1.0);
  const uint64_t before = job.engine().fingerprint();
  auto reductions = [&] {
    const auto& traffic = job.mesh().shard_group().traffic();
    return traffic.contains("reduce_scatter") ? traffic.at("reduce_scatter").calls : 0;
  };
  const int64_t calls = reductions();
  ASSERT_EQ(calls > 0, job.mesh().shards() > 1);

  job.engine().begin_step();
  job.engine().score_tokens(upload(
      pack({{0, 0}, {0, 1}}, {ObjectiveData{&job.task(), false, {}}}, {}), job.engine().backend()));
  job.engine().release_resident();

  EXPECT_EQ(reductions(), calls);
  EXPECT_EQ(job.engine().fingerprint(), before);
}

}  // namespace
}  // namespace safegrad::testing
