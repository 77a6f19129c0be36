// gold_test.cpp: logits, losses, gradients and the projection against transformers' numbers, on any
// number of ranks and any sharding.
#include "dist/gold.h"

#include <cmath>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/surgery.h"
#include "dist/mesh.h"
#include "dist/rank_main.h"

namespace safegrad::testing {
namespace {

struct Layout {
  std::string model;
  int64_t shards;  // 0: all ranks
  Recompute recompute;
  bool two_pass;
};

std::string name_of(const ::testing::TestParamInfo<Layout>& info) {
  const Layout& l = info.param;
  return l.model + (l.shards == 0 ? "_sharded" : "_shards" + std::to_string(l.shards)) +
         (l.recompute == Recompute::block ? "_recompute" : "") + (l.two_pass ? "_two_pass" : "");
}

/// An engine over a gold model, run once on all of its sequences.
struct GoldRun {
  Gold gold;
  dist::Mesh mesh;
  models::OpenedModel model;
  std::unique_ptr<dist::Engine> engine;
  std::vector<double> loss;

  GoldRun(const Layout& layout, std::optional<LoraConfig> lora = {}, bool all_positions = false)
      : gold(layout.model), mesh(world(), layout.shards) {
    ModelSection section;
    section.path = gold.folder();
    section.lora = std::move(lora);
    model = models::open_model(section, 0, backend());
    dist::EngineOptions options;
    options.losses = {dist::Loss::cross_entropy, dist::Loss::kl};
    options.keep_reference_head = true;
    options.recompute = layout.recompute;
    engine = std::make_unique<dist::Engine>(*model.decoder, mesh, options);
    engine->load(*gold.weights_with_adapters(std::move(model.weights)));
    engine->load_reference_head(*gold.reference_head());
    const auto draws = gold.draws(mesh.world().rank(), mesh.world().size());
    const auto objectives = gold.objectives(all_positions);
    engine->begin_step();
    dist::PassSums own = engine->zero_sums();
    if (layout.two_pass) {
      for (size_t k : {size_t{0}, size_t{1}}) {
        std::vector<Draw> chosen;
        for (const Draw& d : draws) {
          if (d.objective == k) chosen.push_back(d);
        }
        engine->forward_backward(upload(pack(chosen, objectives, {}), backend()), {k}, true, own);
      }
    } else {
      engine->forward_backward(upload(pack(draws, objectives, {}), backend()), {0, 1}, true, own);
    }
    engine->end_step();
    loss.assign(2, 0.0);
    const auto all = mesh.world().all_gather_scalars(own.loss);
    for (size_t i = 0; i < all.size(); ++i) loss[i % 2] += all[i];
  }

  Gram mean_gram() {
    const auto all =
        mesh.shard_group().all_gather_scalars(engine->inner_products().sum(0).flatten());
    Gram gram(2);
    for (size_t i = 0; i < all.size(); ++i) gram.values[i % 4] += all[i];
    const double n[] = {gold.number("n_task"), gold.number("n_align")};
    for (size_t i = 0; i < 2; ++i) {
      for (size_t j = 0; j < 2; ++j) gram.at(i, j) /= n[i] * n[j];
    }
    return gram;
  }
};

// float32 sums against float64 ones; the fixtures' own script measured 7e-6 for an independent
// float32 implementation.
constexpr double kGradientTolerance = 1e-5;

// Of the same gradients, whole and in float64: what sharding must not change.
Gram unsharded_gram(GoldRun& run) {
  const auto u = gather_gradients(*run.engine, run.mesh, 0);
  const auto a = gather_gradients(*run.engine, run.mesh, 1);
  const double n_task = run.gold.number("n_task"), n_align = run.gold.number("n_align");
  Gram gram(2);
  for (const auto& [name, u_tensor] : u) {
    const at::Tensor x = u_tensor / n_task, y = a.at(name) / n_align;
    gram.at(0, 0) += (x * x).sum().item<double>();
    gram.at(0, 1) += (x * y).sum().item<double>();
    gram.at(1, 1) += (y * y).sum().item<double>();
  }
  gram.at(1, 0) = gram.at(0, 1);
  return gram;
}

// u·a is a small difference of products whose size is ‖u‖ ‖a‖, so the rounding of float32 gradients
// moves the coefficient −u·a / a·a by an amount in proportion to ‖u‖ / ‖a‖, not to itself.
double coefficient_tolerance(const Gram& gram) {
  return 1e-6 * (1 + std::sqrt(gram.at(0, 0) / gram.at(1, 1)));
}

// Every gradient that we have, and as many as gold has; a prefix such as "grad_task." is followed
// by a Hugging Face name.
void expect_gradients(GoldRun& run, size_t k, const std::string& prefix, size_t expected) {
  const auto gradients = gather_gradients(*run.engine, run.mesh, k);
  EXPECT_EQ(gradients.size(), expected);
  for (const auto& [name, gradient] : gradients) {
    ASSERT_TRUE(run.gold.contains(prefix + name)) << prefix << name;
    EXPECT_LT(relative_error(gradient, run.gold.tensor(prefix + name)), kGradientTolerance)
        << prefix << name;
  }
}

size_t tensors_of(const Gold& gold) {
  return gold.names("grad_task.model.").size() + gold.names("grad_task.lm_head.").size();
}

class GoldModels : public ::testing::TestWithParam<Layout> {
 protected:
  void SetUp() override {
    const int ranks = world()->size();
    const int64_t shards = GetParam().shards;
    if (shards > 0 && (shards > ranks || ranks % shards != 0))
      GTEST_SKIP() << "needs a multiple of " << shards << " ranks";
  }
};

TEST_P(GoldModels, LossesAndGradientsEqualTransformers) {
  GoldRun run(GetParam());

  EXPECT_NEAR(run.loss[0] / run.gold.number("loss_task_sum"), 1.0, 1e-6);
  EXPECT_NEAR(run.loss[1] / run.gold.number("loss_align_sum"), 1.0, 5e-6);
  expect_gradients(run, 0, "grad_task.", tensors_of(run.gold));
  expect_gradients(run, 1, "grad_align.", tensors_of(run.gold));
}

TEST_P(GoldModels, CoefficientEqualsUnshardedFloat64) {
  GoldRun run(GetParam());
  const Gram gram = run.mean_gram();
  const auto c = combine(gram, {Rule::safegrad, 1.0, 0.4});

  if (GetParam().model != "llama_tied") {
    ASSERT_LT(cosine(gram), -0.02) << "the case must be a conflict";
    EXPECT_GT(c[1], 1.05);
  } else {
    ASSERT_GT(cosine(gram), 0.02) << "the case must not be a conflict";
  }
  // The same float32 gradients, summed in another order.
  EXPECT_NEAR(c[1] / combine(unsharded_gram(run), {Rule::safegrad, 1.0, 0.4})[1], 1.0, 1e-12);
  EXPECT_NEAR(c[1], run.gold.number("safegrad_c_align"), coefficient_tolerance(gram));
  EXPECT_NEAR(combined_norm(gram, c) / run.gold.number("safegrad_grad_norm"), 1.0, 1e-6);
  const auto everywhere = dist::all_gather_doubles(run.mesh.world(), c);
  for (size_t i = 0; i < everywhere.size(); ++i)
    EXPECT_EQ(everywhere[i], c[i % 2]) << "rank " << i / 2;
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, GoldModels,
    ::testing::Values(
        Layout{"llama3", 0, Recompute::none, false}, Layout{"llama3", 1, Recompute::none, false},
        Layout{"llama3", 2, Recompute::none, false}, Layout{"llama3", 0, Recompute::block, false},
        Layout{"llama3", 0, Recompute::none, true}, Layout{"llama3", 1, Recompute::none, true},
        Layout{"llama_tied", 0, Recompute::none, false},
        Layout{"llama_tied", 1, Recompute::none, false}, Layout{"qwen2", 0, Recompute::none, false},
        Layout{"qwen2", 1, Recompute::block, false}, Layout{"qwen2", 2, Recompute::none, true},
        Layout{"qwen3", 0, Recompute::none, false}, Layout{"qwen3", 1, Recompute::none, false},
        Layout{"qwen3", 0, Recompute::block, true}),
    name_of);

TEST(GoldLora, AdapterGradientsEqualPeft) {
  LoraConfig lora{.rank = 3, .alpha = 6, .dropout = 0, .targets = {"q_proj", "k_proj", "v_proj"}};
  GoldRun run({"qwen2", 0, Recompute::none, false}, lora);

  EXPECT_NEAR(run.loss[0] / run.gold.number("lora.loss_task_sum"), 1.0, 1e-6);
  EXPECT_NEAR(run.loss[1] / run.gold.number("lora.loss_align_sum"), 1.0, 5e-6);
  expect_gradients(run, 0, "grad_task.lora.", 12);
  expect_gradients(run, 1, "grad_align.lora.", 12);
  const Gram gram = run.mean_gram();
  const auto c = combine(gram, {Rule::safegrad, 1.0, 0.4});
  EXPECT_NEAR(c[1], run.gold.number("lora.safegrad_c_align"), coefficient_tolerance(gram));
}

TEST(GoldKl, AllPositionsAsTheAuthorsSum) {
  GoldRun run({"llama3", 0, Recompute::none, false}, {}, /*all_positions=*/true);

  EXPECT_NEAR(run.loss[1] / run.gold.number("loss_align_all_sum"), 1.0, 5e-6);
  expect_gradients(run, 1, "grad_align_all.", tensors_of(run.gold));
}

class GoldLogits : public ::testing::TestWithParam<std::string> {};

TEST_P(GoldLogits, EqualTransformers) {
  const Gold gold(GetParam());
  dist::Mesh mesh(world(), 0);
  ModelSection section;
  section.path = gold.folder();
  const auto model = models::open_model(section, 0, backend());
  dist::Engine engine(*model.decoder, mesh, {});
  engine.load(*model.weights);
  // Every rank runs every sequence, all positions: gathers are collective, batches need not
  // differ.
  std::vector<ObjectiveData> all = {{&gold.task(), true, {}}, {&gold.align(), true, {}}};
  const at::Tensor h = engine.hidden(upload(pack(gold.draws(0, 1), all, {}), backend()));
  at::Tensor logits;
  engine.with_head([&](Parameter& head, Parameter&) { logits = at::mm(h, head.value.t()).cpu(); });

  const double worst = (logits.to(at::kDouble) - gold.tensor("logits")).abs().max().item<double>();
  EXPECT_LT(worst, 1e-4);  // logits of a few units in float32
}

INSTANTIATE_TEST_SUITE_P(Models, GoldLogits,
                         ::testing::Values("llama3", "llama_tied", "qwen2", "qwen3"),
                         [](const auto& info) { return info.param; });

// The real model, made by tools/smollm2.py: logits at 64 words of the vocabulary, at every position
// of three sequences.
TEST(GoldSmolLM2, LogitsEqualTransformers) {
  const SafetensorsFile gold(SAFEGRAD_SOURCE_DIR "/tests/gold/data/smollm2.safetensors");
  ModelSection section;
  section.path = SAFEGRAD_SOURCE_DIR "/models/smollm2-135m-instruct";
  const auto model = models::open_model(section, 0, backend());
  dist::Mesh mesh(world(), 0);
  dist::Engine engine(*model.decoder, mesh, {});
  engine.load(*model.weights);
  const at::Tensor offsets = read_tensor(gold.at("offsets")).to(at::kLong);
  PackedBatch batch;
  batch.tokens = read_tensor(gold.at("tokens")).to(at::kLong);
  batch.cu_seqlens.assign(offsets.data_ptr<int64_t>(),
                          offsets.data_ptr<int64_t>() + offsets.numel());
  std::vector<at::Tensor> positions;
  for (int64_t n = 0; n < batch.sequences(); ++n) {
    const auto i = static_cast<size_t>(n);
    positions.push_back(at::arange(batch.cu_seqlens[i + 1] - batch.cu_seqlens[i], at::kLong));
  }
  batch.positions = at::cat(positions);
  batch.longest = batch.positions_end = batch.positions.max().item<int64_t>() + 1;
  batch.segments = batch.scored_segments = {0, batch.size()};
  batch.scored = at::arange(batch.size(), at::kLong);
  batch.boundaries = offsets.to(at::kInt);
  const at::Tensor h = engine.hidden(upload(batch, backend()));
  at::Tensor logits;
  engine.with_head([&](Parameter& head, Parameter&) {
    logits = at::mm(h, head.value.t()).to(at::kCPU, at::kDouble);
  });

  const at::Tensor ids = read_tensor(gold.at("vocab_ids")).to(at::kLong);
  const at::Tensor difference =
      (logits.index_select(1, ids) - read_tensor(gold.at("logits"))).abs();
  EXPECT_LT(difference.max().item<double>(),
            1e-3);  // the promise; 30 layers of float32 sums differ in their order
  const at::Tensor lse = (logits.logsumexp(1) - read_tensor(gold.at("logsumexp"))).abs();
  EXPECT_LT(lse.max().item<double>(), 1e-3);
}

}  // namespace
}  // namespace safegrad::testing
