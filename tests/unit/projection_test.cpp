#include "models/projection.h"

#include <limits>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "unit/kernels.h"
#include "unit/numbers.h"

namespace safegrad::models {
namespace {

using test::central_differences;
using test::dot;
using test::dropout;
using test::expect_close;
using test::expect_equal;
using test::random_tensor;
using test::Values;
using test::values_of;

Parameter parameter(std::vector<int64_t> shape, uint64_t seed) {
  Parameter p;
  p.shape = std::move(shape);
  p.value = random_tensor(p.shape, seed);
  for (int k = 0; k < 2; ++k) {
    p.grads.push_back(at::full(p.shape, std::numeric_limits<float>::quiet_NaN(), at::kFloat));
    p.fresh.push_back(true);
  }
  return p;
}

// y += scale · x Wᵀ into columns [column, column + out) of y [rows, y_width].
void add_linear(Values& y, size_t y_width, size_t column, const Values& x, const Values& w,
                size_t in, double scale) {
  const size_t out = w.size() / in;
  for (size_t t = 0; t < x.size() / in; ++t) {
    for (size_t o = 0; o < out; ++o) {
      double sum = 0;
      for (size_t i = 0; i < in; ++i) sum += x[t * in + i] * w[o * in + i];
      y[t * y_width + column + o] += scale * sum;
    }
  }
}

constexpr size_t kIn = 6, kOut1 = 5, kOut2 = 3, kRank = 2, kOut = kOut1 + kOut2;
constexpr double kScale = 1.5;

// Two linear layers on one input, the first with a bias, and an adapter on each.
struct Layer {
  Parameter w1 = parameter({kOut1, kIn}, 1), b1 = parameter({kOut1}, 2);
  Parameter w2 = parameter({kOut2, kIn}, 3);
  Parameter lora_a1 = parameter({kRank, kIn}, 4), lora_b1 = parameter({kOut1, kRank}, 5);
  Parameter lora_a2 = parameter({kRank, kIn}, 6), lora_b2 = parameter({kOut2, kRank}, 7);
  double dropout;
  Projection projection{cpu_kernels()};

  explicit Layer(double p) : dropout(p) {
    projection.add(LinearPart{&w1, &b1, 0});
    projection.add(LinearPart{&w2, nullptr, kOut1});
    projection.add(LoraPart{&lora_a1, &lora_b1, 0, kScale, p, 11});
    projection.add(LoraPart{&lora_a2, &lora_b2, kOut1, kScale, p, 12});
  }
  std::vector<Parameter*> parameters() {
    return {&w1, &b1, &w2, &lora_a1, &lora_b1, &lora_a2, &lora_b2};
  }
};

// Two sequences of objective 0, one of objective 1, of `lengths` tokens.
PackedBatch batch_of(const std::vector<int64_t>& lengths) {
  PackedBatch batch;
  batch.cu_seqlens = {0};
  std::vector<int64_t> positions, keys;
  for (size_t n = 0; n < lengths.size(); ++n) {
    for (int64_t t = 0; t < lengths[n]; ++t) positions.push_back(t);
    batch.cu_seqlens.push_back(batch.size() + lengths[n]);
    keys.resize(positions.size(), static_cast<int64_t>(100 + n));
  }
  batch.dropout_keys = test::indices(keys);
  batch.positions = test::indices(positions);
  batch.segments = {0, batch.cu_seqlens[lengths.size() - 1], batch.size()};
  return batch;
}

// The layer's formula in fp64, given the values of its parameters in order and the adapters' masks.
struct Exact {
  Values mask1, mask2;

  Exact(const Layer& layer, const PackedBatch& batch) {
    const at::Tensor ones = at::ones({batch.size(), static_cast<int64_t>(kIn)});
    const bool drops = layer.dropout > 0;
    mask1 = values_of(drops ? dropout(ones, batch, layer.dropout, 11) : ones);
    mask2 = values_of(drops ? dropout(ones, batch, layer.dropout, 12) : ones);
  }
  Values forward(const Values& x, const std::vector<Values>& p) const {
    const size_t rows = x.size() / kIn;
    Values y(rows * kOut, 0.0), dropped(x.size());
    add_linear(y, kOut, 0, x, p[0], kIn, 1);
    for (size_t t = 0; t < rows; ++t) {
      for (size_t o = 0; o < kOut1; ++o) y[t * kOut + o] += p[1][o];
    }
    add_linear(y, kOut, kOut1, x, p[2], kIn, 1);
    auto adapt = [&](const Values& mask, const Values& a, const Values& b, size_t column) {
      for (size_t i = 0; i < x.size(); ++i) dropped[i] = x[i] * mask[i];
      Values h(rows * kRank, 0.0);
      add_linear(h, kRank, 0, dropped, a, kIn, 1);
      add_linear(y, kOut, column, h, b, kRank, kScale);
    };
    adapt(mask1, p[3], p[4], 0);
    adapt(mask2, p[5], p[6], kOut1);
    return y;
  }
};

std::vector<Values> values(Layer& layer) {
  std::vector<Values> result;
  for (const Parameter* p : layer.parameters()) result.push_back(values_of(p->value));
  return result;
}

// Float sums of a few dozen products of size 1.
constexpr double kFloat = 2e-5;

TEST(Projection, ForwardIsTheFormulaWithAndWithoutDropout) {
  for (double p : {0.0, 0.3}) {
    Layer layer(p);
    const PackedBatch batch = batch_of({4, 2, 5});
    const at::Tensor x = random_tensor({11, kIn}, 8);
    LoraHidden hidden;
    const at::Tensor y = layer.projection.forward(x, batch, &hidden);
    expect_close(y, Exact(layer, batch).forward(values_of(x), values(layer)), kFloat);
    expect_equal(layer.projection.forward(x, batch, nullptr), y);
    EXPECT_EQ(hidden.size(), 2u);
  }
}

TEST(Projection, DropoutChangesTheOutputOnlyWhereKeysAskForIt) {
  Layer dropping(0.3), plain(0);
  PackedBatch batch = batch_of({4, 2, 5});
  const at::Tensor x = random_tensor({11, kIn}, 8);
  EXPECT_FALSE(at::equal(dropping.projection.forward(x, batch, nullptr),
                         plain.projection.forward(x, batch, nullptr)));
  batch.dropout_keys = at::Tensor();  // evaluation
  expect_equal(dropping.projection.forward(x, batch, nullptr),
               plain.projection.forward(x, batch, nullptr));
}

TEST(Projection, WithoutAdaptersTheBaseRunsAlone) {
  Layer layer(0.3), base(0.3);
  base.lora_b1.value.zero_();
  base.lora_b2.value.zero_();
  PackedBatch batch = batch_of({4, 2, 5});
  const at::Tensor x = random_tensor({11, kIn}, 8);
  const at::Tensor expected = base.projection.forward(x, batch, nullptr);
  batch.adapters = false;
  LoraHidden hidden;
  expect_equal(layer.projection.forward(x, batch, &hidden), expected);
  EXPECT_TRUE(hidden.empty());
}

TEST(Projection, EveryGradientMatchesFiniteDifferencesPerObjective) {
  for (double p : {0.0, 0.3}) {
    Layer layer(p);
    const PackedBatch batch = batch_of({4, 2, 5});
    const at::Tensor x = random_tensor({11, kIn}, 9), dy = random_tensor({11, kOut}, 10);
    LoraHidden hidden;
    layer.projection.forward(x, batch, &hidden);

    const at::Tensor dx = layer.projection.input_gradient(dy, batch);
    layer.projection.weight_gradients(dy, x, batch, hidden);

    const Exact exact(layer, batch);
    const Values xs = values_of(x), all_dy = values_of(dy);
    std::vector<Values> weights = values(layer);
    expect_close(dx,
                 central_differences(
                     [&](const Values& v) { return dot(all_dy, exact.forward(v, weights)); }, xs),
                 kFloat);
    for (size_t k = 0; k < 2; ++k) {
      at::Tensor own = at::zeros_like(dy);  // only this objective's tokens count
      const int64_t begin = batch.segments[k], length = batch.segments[k + 1] - begin;
      own.narrow(0, begin, length).copy_(dy.narrow(0, begin, length));
      const Values dy_k = values_of(own);
      for (size_t i = 0; i < weights.size(); ++i) {
        const Values expected = central_differences(
            [&](const Values& v) {
              std::vector<Values> changed = weights;
              changed[i] = v;
              return dot(dy_k, exact.forward(xs, changed));
            },
            weights[i]);
        SCOPED_TRACE(fmt::format("dropout {}, objective {}, parameter {}", p, k, i));
        expect_close(layer.parameters()[i]->grads[k], expected, kFloat);
      }
    }
  }
}

TEST(Projection, GradientsOfAnObjectiveEqualThoseOfARunOfItsOwn) {
  Layer both(0.3), alone(0.3);
  const PackedBatch batch = batch_of({4, 2, 5});
  PackedBatch second = batch_of({5});
  second.dropout_keys = at::full({second.size()}, 102, at::kLong);
  second.segments = {0, 0, 5};
  const at::Tensor x = random_tensor({11, kIn}, 9), dy = random_tensor({11, kOut}, 10);
  LoraHidden hidden, own_hidden;
  both.projection.forward(x, batch, &hidden);
  both.projection.weight_gradients(dy, x, batch, hidden);

  const at::Tensor own_x = x.narrow(0, 6, 5).clone(), own_dy = dy.narrow(0, 6, 5).clone();
  alone.projection.forward(own_x, second, &own_hidden);
  alone.projection.weight_gradients(own_dy, own_x, second, own_hidden);

  for (size_t i = 0; i < both.parameters().size(); ++i) {
    // The same products; a GEMM of another size may add them in another order.
    expect_close(both.parameters()[i]->grads[1], values_of(alone.parameters()[i]->grads[1]), 2e-6);
    EXPECT_TRUE(alone.parameters()[i]->fresh[0]) << "objective 0 had no tokens";
    EXPECT_FALSE(both.parameters()[i]->fresh[0]);
  }
}

TEST(Projection, MicroBatchesAccumulate) {
  Layer once(0.3), twice(0.3);
  const PackedBatch batch = batch_of({4, 2, 5});
  const at::Tensor x = random_tensor({11, kIn}, 9), dy = random_tensor({11, kOut}, 10);
  auto run = [&](Layer& layer) {
    LoraHidden hidden;
    layer.projection.forward(x, batch, &hidden);
    layer.projection.weight_gradients(dy, x, batch, hidden);
  };
  run(once);
  run(twice);
  run(twice);
  for (size_t i = 0; i < once.parameters().size(); ++i) {
    for (size_t k = 0; k < 2; ++k) {
      expect_close(twice.parameters()[i]->grads[k], values_of(once.parameters()[i]->grads[k] * 2),
                   2e-6);  // one more rounding
    }
  }
}

TEST(Projection, AFrozenBaseTakesNoGradientAndNeedsItsInputForAdaptersAlone) {
  Layer layer(0);
  for (Parameter* p : {&layer.w1, &layer.b1, &layer.w2}) p->trainable = false;
  const PackedBatch batch = batch_of({4, 2, 5});
  const at::Tensor x = random_tensor({11, kIn}, 9), dy = random_tensor({11, kOut}, 10);
  LoraHidden hidden;
  layer.projection.forward(x, batch, &hidden);
  layer.projection.weight_gradients(dy, x, batch, hidden);
  EXPECT_TRUE(layer.w1.fresh[0] && layer.b1.fresh[0] && layer.w2.fresh[0]);
  EXPECT_FALSE(layer.lora_a1.fresh[0] || layer.lora_b2.fresh[0]);
  EXPECT_TRUE(layer.projection.needs_input());

  Projection frozen(cpu_kernels());
  frozen.add(LinearPart{&layer.w2, nullptr, 0});
  EXPECT_FALSE(frozen.needs_input());
  frozen.weight_gradients(dy, at::Tensor(), batch, {});  // an undefined input is fine then
  layer.w2.trainable = true;
  EXPECT_TRUE(frozen.needs_input());
}

TEST(Projection, NoTokensGiveEmptyTensorsAndLeaveGradientsFresh) {
  Layer layer(0.3);
  PackedBatch batch;
  batch.cu_seqlens = {0};
  batch.segments = {0, 0, 0};
  batch.positions = at::empty({0}, at::kLong);
  LoraHidden hidden;
  const at::Tensor x = at::empty({0, kIn}), dy = at::empty({0, kOut});
  EXPECT_EQ(layer.projection.forward(x, batch, &hidden).sizes(),
            (at::IntArrayRef{0, static_cast<int64_t>(kOut)}));
  EXPECT_EQ(layer.projection.input_gradient(dy, batch).sizes(),
            (at::IntArrayRef{0, static_cast<int64_t>(kIn)}));
  layer.projection.weight_gradients(dy, x, batch, hidden);
  for (const Parameter* p : layer.parameters()) EXPECT_TRUE(p->fresh[0] && p->fresh[1]);
}

TEST(Projection, CountsTheMultiplicationsOfATokenPass) {
  Layer layer(0);
  const double linear = kIn * (kOut1 + kOut2), lora = kRank * (2 * kIn + kOut1 + kOut2);
  EXPECT_EQ(layer.projection.forward_macs(), linear + lora);
  EXPECT_EQ(layer.projection.weight_gradient_macs(), linear + lora);
  layer.w1.trainable = false;
  EXPECT_EQ(layer.projection.weight_gradient_macs(), kIn * kOut2 + lora);
  EXPECT_EQ(layer.projection.in_features(), static_cast<int64_t>(kIn));
  EXPECT_EQ(layer.projection.out_features(), static_cast<int64_t>(kOut));
}

}  // namespace
}  // namespace safegrad::models
