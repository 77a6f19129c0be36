#include <limits>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "models/rotary.h"
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
using test::rms_norm;
using test::rms_norm_backward;
using test::rotate;
using test::swiglu;
using test::swiglu_backward;
using test::Values;
using test::values_of;

// bfloat16 keeps 8 bits, so rounding to it errs by at most 2⁻⁸ of the value.
constexpr double kBfloat16 = 0x1p-8;

struct Shape {
  int64_t rows, width;
};
const Shape kShapes[] = {{1, 5}, {3, 5}, {257, 5}, {3, 64}, {257, 64}, {3, 2049}, {257, 2049}};

Parameter vector_parameter(const at::Tensor& value, size_t objectives) {
  Parameter p;
  p.shape = {value.numel()};
  p.value = value;
  for (size_t k = 0; k < objectives; ++k) {
    p.grads.push_back(at::full_like(value, std::numeric_limits<float>::quiet_NaN()));
    p.fresh.push_back(true);
  }
  return p;
}

Values normed(const Values& x, const Values& w, double eps) {
  const size_t d = w.size();
  Values y(x.size());
  for (size_t i = 0; i < x.size(); i += d) {
    double square = 0;
    for (size_t j = 0; j < d; ++j) square += x[i + j] * x[i + j];
    const double scale = 1 / std::sqrt(square / static_cast<double>(d) + eps);
    for (size_t j = 0; j < d; ++j) y[i + j] = x[i + j] * scale * w[j];
  }
  return y;
}

TEST(RmsNorm, MatchesFp64OnDenseAndStridedRows) {
  for (const auto& [rows, width] : kShapes) {
    const at::Tensor x = random_tensor({rows, width}, 1) * 3, w = random_tensor({width}, 2);
    const Values expected = normed(values_of(x), values_of(w), 1e-5);
    at::Tensor rstd, strided_rstd;
    const at::Tensor y = rms_norm(x, w, 1e-5, rstd);
    // Float: a sum of up to 2049 squares in 8 lanes, a root, two products.
    expect_close(y, expected, 2e-6);
    expect_equal(rms_norm(test::strided(x), w, 1e-5, strided_rstd), y);
    EXPECT_EQ(rstd.numel(), rows);
    expect_equal(rstd, strided_rstd);
  }
}

TEST(RmsNorm, EpsilonKeepsAZeroRowFinite) {
  at::Tensor rstd;
  const at::Tensor y = rms_norm(at::zeros({2, 5}), at::ones({5}), 1e-6, rstd);
  expect_equal(y, at::zeros({2, 5}));
  expect_close(rstd, {1e3, 1e3}, 1e-6);
}

TEST(RmsNorm, ComputesInFloatForBfloat16) {
  const at::Tensor x = random_tensor({3, 64}, 3).to(at::kBFloat16);
  const at::Tensor w = random_tensor({64}, 4).to(at::kBFloat16);
  at::Tensor rstd;
  const at::Tensor y = rms_norm(x, w, 1e-5, rstd);
  EXPECT_EQ(rstd.scalar_type(), at::kFloat);
  const Values expected = normed(values_of(x), values_of(w), 1e-5), got = values_of(y);
  for (size_t i = 0; i < got.size(); ++i) {
    // The result is rounded once; nothing before it is.
    EXPECT_NEAR(got[i], expected[i], std::abs(expected[i]) * kBfloat16 * 1.01 + 1e-30);
  }
}

// dx and dw of Σ dy·y, by the formula, in fp64.
std::pair<Values, Values> norm_gradients(const Values& dy, const Values& x, const Values& w,
                                         double eps) {
  const size_t d = w.size();
  Values dx(x.size()), dw(d, 0.0);
  for (size_t i = 0; i < x.size(); i += d) {
    double square = 0, along = 0;
    for (size_t j = 0; j < d; ++j) {
      square += x[i + j] * x[i + j];
      along += dy[i + j] * w[j] * x[i + j];
    }
    const double r = 1 / std::sqrt(square / static_cast<double>(d) + eps);
    for (size_t j = 0; j < d; ++j) {
      dx[i + j] = r * dy[i + j] * w[j] - r * r * r * x[i + j] * along / static_cast<double>(d);
      dw[j] += dy[i + j] * x[i + j] * r;
    }
  }
  return {dx, dw};
}

TEST(RmsNormBackward, MatchesFiniteDifferences) {
  const double eps = 1e-2;  // large enough to matter
  const at::Tensor x = random_tensor({3, 5}, 5), w = random_tensor({5}, 6);
  const at::Tensor dy = random_tensor({3, 5}, 7);
  Parameter weight = vector_parameter(w, 1);
  at::Tensor rstd, dx = at::zeros({3, 5});
  rms_norm(x, w, eps, rstd);

  rms_norm_backward(dy, x, rstd, weight, {0, 3}, dx);

  const Values xs = values_of(x), ws = values_of(w), dys = values_of(dy);
  // Float sums of a handful of terms of size 1.
  expect_close(
      dx, central_differences([&](const Values& v) { return dot(dys, normed(v, ws, eps)); }, xs),
      2e-6);
  expect_close(
      weight.grads[0],
      central_differences([&](const Values& v) { return dot(dys, normed(xs, v, eps)); }, ws), 2e-6);
}

TEST(RmsNormBackward, AddsToDxAndSplitsTheWeightGradientByObjective) {
  for (const auto& [rows, width] : kShapes) {
    const at::Tensor x = random_tensor({rows, width}, 8), w = random_tensor({width}, 9);
    const at::Tensor dy = random_tensor({rows, width}, 10), start = random_tensor(x.sizes(), 11);
    Parameter weight = vector_parameter(w, 3);
    const int64_t cut = rows / 3;  // objective 1 has no rows
    at::Tensor rstd, dx = test::strided(start);
    rms_norm(x, w, 1e-5, rstd);

    rms_norm_backward(test::strided(dy), test::strided(x), rstd, weight, {0, cut, cut, rows}, dx);

    Values expected = norm_gradients(values_of(dy), values_of(x), values_of(w), 1e-5).first;
    const Values before = values_of(start);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += before[i];
    expect_close(dx, expected, 5e-6);  // a float sum of up to 2049 products of size 1, / width
    EXPECT_TRUE(weight.fresh[1]);
    for (auto [k, begin, end] : {std::tuple<size_t, int64_t, int64_t>{0, 0, cut}, {2, cut, rows}}) {
      if (begin == end) continue;
      const auto own =
          norm_gradients(values_of(dy.narrow(0, begin, end - begin)),
                         values_of(x.narrow(0, begin, end - begin)), values_of(w), 1e-5);
      expect_close(weight.grads[k], own.second, 3e-5);  // 257 · 2 · 6e-8
    }
  }
}

TEST(RmsNormBackward, AFrozenWeightTakesNoGradient) {
  const at::Tensor x = random_tensor({3, 5}, 12), w = at::ones({5});
  Parameter weight = vector_parameter(w, 1);
  weight.trainable = false;
  at::Tensor rstd, dx = at::zeros({3, 5});
  rms_norm(x, w, 1e-5, rstd);
  rms_norm_backward(x, x, rstd, weight, {0, 3}, dx);
  EXPECT_TRUE(weight.fresh[0]);
}

std::pair<at::Tensor, at::Tensor> tables(int64_t head_dim, int64_t positions) {
  DecoderConfig config;
  config.head_dim = head_dim;
  return rotary_tables(config, positions);
}

TEST(Rotate, TurnsEveryPairOfHalvesByItsAngle) {
  const int64_t tokens = 5, heads = 3, d = 6;
  const auto [cos, sin] = tables(d, 20);
  const std::vector<int64_t> positions = {0, 19, 7, 1, 2};
  const at::Tensor x = random_tensor({tokens, heads * d + 4}, 13);
  at::Tensor got = x.clone();

  rotate(got.narrow(1, 0, heads * d).view({tokens, heads, d}), test::indices(positions), cos, sin,
         false);

  Values expected = values_of(x);
  const Values from = values_of(x);
  for (size_t t = 0; t < 5; ++t) {
    for (size_t h = 0; h < 3; ++h) {
      for (size_t i = 0; i < 3; ++i) {
        const double angle = static_cast<double>(positions[t]) *
                             std::pow(10000.0, -2.0 * static_cast<double>(i) / 6);
        const size_t low = t * 22 + h * 6 + i, high = low + 3;
        expected[low] = from[low] * std::cos(angle) - from[high] * std::sin(angle);
        expected[high] = from[high] * std::cos(angle) + from[low] * std::sin(angle);
      }
    }
  }
  expect_close(got, expected, 3e-6);  // the angle is a float: 19 · 6e-8, times values of size 3
}

TEST(Rotate, InverseUndoesItAndIsItsTranspose) {
  const auto [cos, sin] = tables(64, 300);
  const at::Tensor positions = at::arange(43, 300, at::kLong);
  const at::Tensor x = random_tensor({257, 2, 64}, 14), y = random_tensor({257, 2, 64}, 15);
  at::Tensor turned = x.clone(), y_back = y.clone();
  rotate(turned, positions, cos, sin, false);
  rotate(y_back, positions, cos, sin, true);

  EXPECT_NEAR(dot(values_of(turned), values_of(y)), dot(values_of(x), values_of(y_back)),
              1e-3);  // 33k products with a float's rounding each
  at::Tensor back = turned.clone();
  rotate(back, positions, cos, sin, true);
  expect_close(back, values_of(x), 1e-6);  // two rotations of floats of size up to 4
  EXPECT_GT((turned - x).abs().max().item<float>(), 1.0f);
}

TEST(Rotate, ScoresDependOnTheDistanceOfPositionsAlone) {
  const auto [cos, sin] = tables(64, 1100);
  const at::Tensor q = random_tensor({1, 1, 64}, 16), k = random_tensor({1, 1, 64}, 17);
  auto score = [&, &cos = cos, &sin = sin](int64_t a, int64_t b) {
    at::Tensor qa = q.clone(), kb = k.clone();
    rotate(qa, test::indices({a}), cos, sin, false);
    rotate(kb, test::indices({b}), cos, sin, false);
    return dot(values_of(qa), values_of(kb));
  };
  EXPECT_NEAR(score(9, 4), score(1005, 1000), 2e-3);  // angles of 1000 are floats right to 6e-5
  EXPECT_GT(std::abs(score(9, 4) - score(9, 5)), 1e-2);
}

double silu(double x) {
  return x / (1 + std::exp(-x));
}

Values swiglu_of(const Values& gate_up, size_t width) {
  Values act;
  for (size_t t = 0; t < gate_up.size(); t += 2 * width) {
    for (size_t j = 0; j < width; ++j) act.push_back(silu(gate_up[t + j]) * gate_up[t + width + j]);
  }
  return act;
}

TEST(Swiglu, MatchesFp64AndFiniteDifferences) {
  const at::Tensor gate_up = random_tensor({3, 10}, 18) * 3, dact = random_tensor({3, 5}, 19);
  at::Tensor dgate_up, act;
  swiglu_backward(dact, gate_up, dgate_up, act);

  const Values x = values_of(gate_up), dy = values_of(dact);
  expect_close(act, swiglu_of(x, 5), 1e-6);  // a few float operations
  expect_close(dgate_up,
               central_differences([&](const Values& v) { return dot(dy, swiglu_of(v, 5)); }, x),
               2e-6);
}

TEST(Swiglu, TheBackwardRecomputesTheForwardBitForBit) {
  for (const auto& [rows, width] : kShapes) {
    const at::Tensor gate_up = random_tensor({rows, 2 * width}, 20) * 4;
    const at::Tensor forward = swiglu(gate_up);
    expect_close(forward, swiglu_of(values_of(gate_up), static_cast<size_t>(width)), 1e-6);
    at::Tensor dgate_up, act;
    swiglu_backward(random_tensor({rows, width}, 21), gate_up, dgate_up, act);
    expect_equal(act, forward);
  }
}

TEST(Swiglu, LargeGatesSaturateWithoutNaN) {
  const at::Tensor gate_up = at::tensor({500.0f, -500.0f, 0.0f, 2.0f, 2.0f, 2.0f}).view({1, 6});
  at::Tensor dgate_up, act;
  swiglu_backward(at::ones({1, 3}), gate_up, dgate_up, act);
  expect_close(act, {1000, 0, 0}, 1e-6);
  expect_close(dgate_up, {2, 0, 1, 500, 0, 0}, 1e-6);
}

TEST(Swiglu, RunsInBfloat16AndOnNoTokens) {
  const at::Tensor gate_up = random_tensor({3, 10}, 22).to(at::kBFloat16);
  const Values expected = swiglu_of(values_of(gate_up), 5);
  expect_close(swiglu(gate_up), expected, kBfloat16 * 1.01);
  EXPECT_EQ(swiglu(at::empty({0, 10})).sizes(), (at::IntArrayRef{0, 5}));
}

// Sequences with dropout keys, end to end.
PackedBatch batch_of(const std::vector<std::pair<uint64_t, int64_t>>& key_and_length) {
  PackedBatch batch;
  batch.cu_seqlens = {0};
  std::vector<int64_t> positions, keys;
  for (const auto& [key, length] : key_and_length) {
    for (int64_t t = 0; t < length; ++t) positions.push_back(t);
    batch.cu_seqlens.push_back(batch.size() + length);
    keys.resize(positions.size(), static_cast<int64_t>(key));
  }
  batch.dropout_keys = test::indices(keys);
  batch.positions = test::indices(positions);
  batch.segments = {0, batch.size()};
  return batch;
}

at::Tensor mask(const PackedBatch& batch, int64_t width, double p, uint64_t site) {
  return dropout(at::ones({batch.size(), width}), batch, p, site);
}

TEST(Dropout, ZeroesTheRightShareAndScalesTheRest) {
  const PackedBatch batch = batch_of({{1, 200}, {2, 57}});
  for (double p : {0.1, 0.5}) {
    const at::Tensor m = mask(batch, 2049, p, 3);
    const at::Tensor zero = m.eq(0);
    const auto n = static_cast<double>(m.numel());
    const double deviation = std::sqrt(p * (1 - p) / n);
    EXPECT_NEAR(zero.sum().item<double>() / n, p, 4 * deviation);
    // Kept elements are 1 / (1 - p) with p rounded to 16 bits.
    const at::Tensor kept = m.masked_select(zero.logical_not());
    expect_close(kept, Values(static_cast<size_t>(kept.numel()), 1 / (1 - p)), 2e-5);
  }
}

TEST(Dropout, LanesNeighboursRowsAndSitesAreIndependent) {
  const PackedBatch batch = batch_of({{1, 4096}});
  const at::Tensor zero = mask(batch, 64, 0.5, 3).eq(0).to(at::kFloat) - 0.5;
  auto correlation = [](const at::Tensor& a, const at::Tensor& b) {
    return (4 * (a * b).mean()).item<double>();
  };
  // ±1 products over n = 258,048 or more: deviation 0.002; five of them pass.
  for (int64_t distance : {1, 2, 4, 8, 32}) {
    const int64_t rest = 64 - distance;
    EXPECT_NEAR(correlation(zero.narrow(1, 0, rest), zero.narrow(1, distance, rest)), 0, 0.015);
    EXPECT_NEAR(correlation(zero.narrow(0, 0, 4000), zero.narrow(0, distance, 4000)), 0, 0.01);
  }
  EXPECT_NEAR(correlation(zero, mask(batch, 64, 0.5, 4).eq(0).to(at::kFloat) - 0.5), 0, 0.01);
  const at::Tensor other = mask(batch_of({{2, 4096}}), 64, 0.5, 3).eq(0).to(at::kFloat) - 0.5;
  EXPECT_NEAR(correlation(zero, other), 0, 0.01);
  const at::Tensor per_feature = zero.mean(0);  // 4096 draws each: deviation 0.008
  EXPECT_LE(per_feature.abs().max().item<double>(), 0.04);
}

TEST(Dropout, DrawsDoNotDependOnTheLayout) {
  for (int64_t width : {5, 64, 2049}) {
    const at::Tensor together = mask(batch_of({{7, 9}, {8, 4}, {9, 6}}), width, 0.3, 1);
    const at::Tensor reordered = mask(batch_of({{9, 6}, {7, 9}}), width, 0.3, 1);
    const at::Tensor alone = mask(batch_of({{8, 4}}), width, 0.3, 1);
    expect_equal(reordered.narrow(0, 0, 6), together.narrow(0, 13, 6));
    expect_equal(reordered.narrow(0, 6, 9), together.narrow(0, 0, 9));
    expect_equal(alone, together.narrow(0, 9, 4));
    EXPECT_FALSE(at::equal(together.narrow(0, 0, 4), alone));
  }
}

TEST(Dropout, TheSameMaskMultipliesForwardAndBackward) {
  const PackedBatch batch = batch_of({{7, 9}, {8, 4}});
  const at::Tensor x = random_tensor({13, 65}, 23), m = mask(batch, 65, 0.4, 2);
  expect_equal(dropout(x, batch, 0.4, 2), x * m);
  expect_equal(dropout(x, batch, 0.4, 2), dropout(x, batch, 0.4, 2));
  const at::Tensor narrow = dropout(x.to(at::kBFloat16), batch, 0.4, 2);
  expect_equal(narrow.eq(0), m.eq(0));  // the draw is the element type's affair no more
}

TEST(AddRows, RepeatedRowsOfATableAddUp) {
  at::Tensor table = at::zeros({4, 3});
  const at::Tensor g = at::arange(12, at::kFloat).view({4, 3});

  cpu_kernels().add_rows(table, test::indices({2, 0, 2, 2}), g);
  cpu_kernels().add_rows(table, test::indices({3}), at::ones({1, 3}));

  // Rows 0 + 2 + 3 of g end in row 2, row 1 in row 0.
  const Values expected = {3, 4, 5, 0, 0, 0, 15, 18, 21, 1, 1, 1};
  expect_close(table, expected, 0);  // small integers are exact
}

TEST(AddRows, IsTheSameBitsOnManyThreads) {
  constexpr int64_t kRows = 3000, kWidth = 64;  // more than one thread's share
  const at::Tensor rows = at::arange(kRows, at::kLong) % 7, g = random_tensor({kRows, kWidth}, 24);
  const int before = at::get_num_threads();
  std::vector<at::Tensor> tables;
  for (int threads : {1, 4, 4, 4, 4}) {
    at::set_num_threads(threads);
    tables.push_back(at::zeros({7, kWidth}));
    cpu_kernels().add_rows(tables.back(), rows, g);
  }
  at::set_num_threads(before);
  for (const at::Tensor& table : tables) expect_equal(table, tables[0]);
}

// float64 products of floats are exact; what rounds is their sum.
TEST(RowProducts, AddToTheSumsOfFp64) {
  for (at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (const auto& [rows, width] : kShapes) {
      const at::Tensor a = random_tensor({rows, width}, 31).to(type);
      const at::Tensor b = random_tensor({rows, width}, 32).to(type);
      const at::Tensor before = random_tensor({rows}, 33).to(at::kDouble);
      const Values expected =
          values_of(before - 0.5 * (a.to(at::kDouble) * b.to(at::kDouble)).sum(1));
      for (const at::Tensor& left : {a, test::strided(a)}) {
        at::Tensor sums = before.clone();
        cpu_kernels().add_row_products(left, b, -0.5, sums);
        expect_close(sums, expected, 1e-12 * static_cast<double>(width));
      }
      at::Tensor sums = at::zeros({rows}, at::kDouble);
      cpu_kernels().add_row_products(a, b[0].expand_as(a), 1.0, sums);  // a bias
      expect_close(sums, values_of(a.to(at::kDouble).mv(b[0].to(at::kDouble))),
                   1e-12 * static_cast<double>(width));
    }
  }
}

}  // namespace
}  // namespace safegrad::models
