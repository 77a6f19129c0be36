#include <limits>

#include <gtest/gtest.h>

#include "core/head_loss.h"
#include "unit/kernels.h"
#include "unit/numbers.h"

namespace safegrad {
namespace {

using test::central_differences;
using test::cross_entropy_head;
using test::cross_entropy_rows;
using test::expect_close;
using test::expect_equal;
using test::kl_head;
using test::kl_rows;
using test::random_tensor;
using test::Values;
using test::values_of;

at::Tensor random_targets(int64_t n, int64_t width, uint64_t seed) {
  std::mt19937_64 bits(seed);
  std::vector<int64_t> targets;
  for (int64_t i = 0; i < n; ++i) {
    targets.push_back(static_cast<int64_t>(bits() % static_cast<uint64_t>(width)));
  }
  return test::indices(targets);
}

double log_sum_exp(const double* x, size_t n) {
  const double top = *std::max_element(x, x + n);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += std::exp(x[i] - top);
  return top + std::log(sum);
}

double cross_entropy(const Values& logits, const at::Tensor& targets) {
  const auto n = static_cast<size_t>(targets.numel()), width = logits.size() / n;
  double sum = 0;
  for (size_t i = 0; i < n; ++i) {
    const double* row = logits.data() + i * width;
    sum += log_sum_exp(row, width) - row[targets.data_ptr<int64_t>()[i]];
  }
  return sum;
}

double kl(const Values& logits, const Values& reference, size_t n) {
  const size_t width = logits.size() / n;
  double sum = 0;
  for (size_t i = 0; i < n; ++i) {
    const double *x = logits.data() + i * width, *ref = reference.data() + i * width;
    const double lse = log_sum_exp(x, width), ref_lse = log_sum_exp(ref, width);
    for (size_t j = 0; j < width; ++j) {
      const double log_p_ref = ref[j] - ref_lse;
      sum += std::exp(log_p_ref) * (log_p_ref - (x[j] - lse));
    }
  }
  return sum;
}

Values softmax(const Values& logits, size_t n) {
  const size_t width = logits.size() / n;
  Values p(logits.size());
  for (size_t i = 0; i < n; ++i) {
    const double lse = log_sum_exp(logits.data() + i * width, width);
    for (size_t j = 0; j < width; ++j) p[i * width + j] = std::exp(logits[i * width + j] - lse);
  }
  return p;
}

// A row: exponentials right to 1.5 ulp, a float sum over at most 2048 / 8 terms a lane. Seen: 3e-7.
constexpr double kRow = 1e-6;

struct Shape {
  int64_t rows, width;
};
const Shape kShapes[] = {{1, 5},  {3, 5},   {257, 5},  {1, 64},    {3, 64},
                         {3, 65}, {257, 1}, {1, 2049}, {257, 2049}};

TEST(CrossEntropyRows, MatchFp64InLossAndGradient) {
  for (const auto& [rows, width] : kShapes) {
    at::Tensor logits = random_tensor({rows, width}, 1) * 4;
    const Values x = values_of(logits);
    const at::Tensor targets = random_targets(rows, width, 2);
    Values gradient = softmax(x, static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) {
      gradient[static_cast<size_t>(i * width + targets.data_ptr<int64_t>()[i])] -= 1;
    }

    const double loss = cross_entropy_rows(logits, targets);

    EXPECT_NEAR(loss, cross_entropy(x, targets), kRow * static_cast<double>(rows));
    expect_close(logits, gradient, kRow);
  }
}

TEST(CrossEntropyRows, TheGradientIsThatOfTheLoss) {
  at::Tensor logits = random_tensor({3, 5}, 3);
  const at::Tensor targets = random_targets(3, 5, 4);
  const Values expected = central_differences(
      [&](const Values& x) { return cross_entropy(x, targets); }, values_of(logits));
  cross_entropy_rows(logits, targets);
  expect_close(logits, expected, kRow);
}

TEST(CrossEntropyRows, LargeLogitsNeitherOverflowNorLoseTheLoss) {
  at::Tensor logits = at::tensor({1e4f, 1e4f + 1, -1e4f, 300.0f, -300.0f, 299.0f}).view({2, 3});
  const at::Tensor targets = test::indices({2, 0});
  const double expected = cross_entropy(values_of(logits), targets);

  const double loss = cross_entropy_rows(logits, targets);

  EXPECT_NEAR(loss, expected, 1e-7 * expected);  // exponentials of 20001 do not matter
  EXPECT_NEAR(logits[0][2].item<float>(), -1, kRow);
}

TEST(KlRows, MatchFp64InLossAndGradient) {
  for (const auto& [rows, width] : kShapes) {
    at::Tensor logits = random_tensor({rows, width}, 5) * 2;
    at::Tensor reference = random_tensor({rows, width}, 6) * 2;
    const Values x = values_of(logits), ref = values_of(reference);
    const auto n = static_cast<size_t>(rows);
    Values gradient = softmax(x, n);
    const Values p_ref = softmax(ref, n);
    for (size_t i = 0; i < gradient.size(); ++i) gradient[i] -= p_ref[i];

    const double loss = kl_rows(logits, reference);

    const double expected = kl(x, ref, n);
    EXPECT_NEAR(loss, expected, kRow * (static_cast<double>(rows) + expected));
    expect_close(logits, gradient, kRow);
  }
}

TEST(KlRows, TheGradientIsThatOfTheLoss) {
  at::Tensor logits = random_tensor({3, 5}, 7), reference = random_tensor({3, 5}, 8);
  const Values ref = values_of(reference);
  const Values expected =
      central_differences([&](const Values& x) { return kl(x, ref, 3); }, values_of(logits));
  kl_rows(logits, reference);
  expect_close(logits, expected, kRow);
}

TEST(KlRows, EqualLogitsGiveExactlyZero) {
  at::Tensor logits = random_tensor({3, 2049}, 9) * 5, reference = logits.clone();
  EXPECT_EQ(kl_rows(logits, reference), 0);
  expect_equal(logits, at::zeros_like(logits));
}

TEST(KlRows, ASmallDivergenceKeepsItsDigits) {
  const at::Tensor start = random_tensor({257, 2049}, 10);
  at::Tensor logits = start + random_tensor({257, 2049}, 11) * 1e-2, reference = start.clone();
  const double expected = kl(values_of(logits), values_of(start), 257);

  const double loss = kl_rows(logits, reference);

  ASSERT_NEAR(expected / 257, 0.5e-4, 0.1e-4);   // half the variance of the difference, a row
  EXPECT_NEAR(loss, expected, 1e-3 * expected);  // float sums of size 1, right to 5e-8 on average
}

TEST(LossRows, NotANumberIsNeverSwallowed) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (int64_t place : {0, 3, 64}) {
      at::Tensor logits = random_tensor({2, 65}, 12);
      logits[1][place] = bad;
      at::Tensor again = logits.clone(), reference = random_tensor({2, 65}, 13);
      EXPECT_FALSE(std::isfinite(cross_entropy_rows(logits, test::indices({1, 1}))));
      EXPECT_FALSE(std::isfinite(kl_rows(again, reference)));
    }
  }
}

TEST(LossRows, NoRowsGiveZero) {
  at::Tensor logits = at::empty({0, 5}), reference = at::empty({0, 5});
  EXPECT_EQ(cross_entropy_rows(logits, at::empty({0}, at::kLong)), 0);
  EXPECT_EQ(kl_rows(logits, reference), 0);
}

TEST(LogProbabilities, AreLogSoftmaxAtTheTargets) {
  const at::Tensor logits = random_tensor({257, 65}, 14) * 3;
  const at::Tensor targets = random_targets(257, 65, 15);
  const Values p = softmax(values_of(logits), 257);
  Values expected;
  for (int64_t i = 0; i < 257; ++i) {
    expected.push_back(std::log(p[static_cast<size_t>(i * 65 + targets.data_ptr<int64_t>()[i])]));
  }
  const at::Tensor got = log_probabilities(logits, targets);
  EXPECT_EQ(got.scalar_type(), at::kDouble);
  expect_close(got, expected, kRow);
}

// The head: h Wᵀ, then the loss. Everything in fp64 for comparison.
struct Head {
  int64_t rows, width = 5, vocabulary = 65;
  at::Tensor h = random_tensor({rows, width}, 20), h_ref = random_tensor({rows, width}, 21);
  at::Tensor reference_weight = random_tensor({vocabulary, width}, 22);
  at::Tensor targets = random_targets(rows, vocabulary, 23);
  Parameter weight = make_weight();

  Parameter make_weight() const {
    Parameter p;
    p.shape = {vocabulary, width};
    p.value = random_tensor(p.shape, 24);
    for (int k = 0; k < 2; ++k) {
      p.grads.push_back(at::full(p.shape, std::numeric_limits<float>::quiet_NaN(), at::kFloat));
    }
    p.fresh = {true, true};
    return p;
  }
  static Values logits(const Values& h, const Values& w, size_t width) {
    const size_t rows = h.size() / width, vocabulary = w.size() / width;
    Values out(rows * vocabulary, 0.0);
    for (size_t i = 0; i < rows; ++i) {
      for (size_t v = 0; v < vocabulary; ++v) {
        for (size_t d = 0; d < width; ++d)
          out[i * vocabulary + v] += h[i * width + d] * w[v * width + d];
      }
    }
    return out;
  }
  double loss(bool with_kl, const Values& h_values, const Values& w) const {
    const auto d = static_cast<size_t>(width);
    const Values x = logits(h_values, w, d);
    if (!with_kl) return cross_entropy(x, targets);
    return kl(x, logits(values_of(h_ref), values_of(reference_weight), d),
              static_cast<size_t>(rows));
  }
  double run(bool with_kl, size_t k, at::Tensor dh) {
    return with_kl ? kl_head(h, h_ref, weight, reference_weight, k, dh)
                   : cross_entropy_head(h, targets, weight, k, dh);
  }
};

// Logits are computed a block of words at a time: more than two blocks, the last one not whole.
TEST(HeadLoss, ALargeVocabularyGivesWhatOneProductWould) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Head head{.rows = 3, .vocabulary = 2 * 2048 + 5};
    for (at::Tensor* t : {&head.h, &head.h_ref, &head.reference_weight, &head.weight.value})
      *t = t->to(dtype);
    at::Tensor logits = at::mm(head.h, head.weight.value.t()).to(at::kFloat);
    at::Tensor reference = at::mm(head.h_ref, head.reference_weight.t()).to(at::kFloat);
    at::Tensor logits_again = logits.clone();

    // The same numbers, whatever the blocks; a last digit of the product may differ.
    const double tolerance = dtype == at::kFloat ? 1e-5 : 1e-2;
    EXPECT_NEAR(head.run(false, 0, {}), cross_entropy_rows(logits, head.targets), tolerance);
    EXPECT_NEAR(head.run(true, 0, {}), kl_rows(logits_again, reference), tolerance);
  }
}

TEST(HeadLoss, LossAndBothGradientsMatchFiniteDifferencesOfFp64) {
  for (bool with_kl : {false, true}) {
    Head head{.rows = 3};
    const Values h = values_of(head.h), w = values_of(head.weight.value);
    at::Tensor dh = at::empty_like(head.h);

    const double loss = head.run(with_kl, 1, dh);

    EXPECT_NEAR(loss, head.loss(with_kl, h, w), 1e-5);  // logits of size 5, three rows
    // Gradients are sums of 65 or 3 products of size 1 with a row's error.
    expect_close(dh, central_differences([&](auto& x) { return head.loss(with_kl, x, w); }, h),
                 1e-5);
    expect_close(head.weight.grads[1],
                 central_differences([&](auto& x) { return head.loss(with_kl, h, x); }, w), 1e-5);
    EXPECT_TRUE(head.weight.fresh[0]) << "objective 0 was not asked for";
  }
}

TEST(HeadLoss, ChunksAddUpToTheWhole) {
  const int64_t chunk = cpu_kernels().head_chunk();
  for (int64_t rows : {chunk - 1, chunk, chunk + 1, 2 * chunk + 88}) {
    for (bool with_kl : {false, true}) {
      Head head{.rows = rows};
      at::Tensor dh = at::empty_like(head.h);
      const double loss = head.run(with_kl, 0, dh);

      const Values h = values_of(head.h), w = values_of(head.weight.value);
      const double expected = head.loss(with_kl, h, w);
      EXPECT_NEAR(loss, expected, 1e-6 * expected);  // every row to 1e-6
      const auto d = static_cast<size_t>(head.width), n = static_cast<size_t>(rows);
      Values dlogits = softmax(Head::logits(h, w, d), n);
      const Values p_ref =
          softmax(Head::logits(values_of(head.h_ref), values_of(head.reference_weight), d), n);
      Values dw(w.size(), 0.0), dh_expected(h.size(), 0.0);
      for (size_t i = 0; i < n; ++i) {
        for (size_t v = 0; v < 65; ++v) {
          const auto target = static_cast<size_t>(head.targets.data_ptr<int64_t>()[i]);
          const double g = dlogits[i * 65 + v] - (with_kl ? p_ref[i * 65 + v] : v == target);
          for (size_t j = 0; j < d; ++j) {
            dw[v * d + j] += g * h[i * d + j];
            dh_expected[i * d + j] += g * w[v * d + j];
          }
        }
      }
      expect_close(dh, dh_expected, 1e-5);
      expect_close(head.weight.grads[0], dw, 1e-4);  // up to 600 products of size 1
    }
  }
}

TEST(HeadLoss, WithoutDhOnlyTheLossIsComputedAndAFrozenHeadTakesNoGradient) {
  for (bool with_kl : {false, true}) {
    Head head{.rows = 3};
    at::Tensor dh = at::empty_like(head.h);
    const double loss = head.run(with_kl, 0, {});
    EXPECT_TRUE(head.weight.fresh[0]);

    head.weight.trainable = false;
    EXPECT_EQ(head.run(with_kl, 0, dh), loss);

    EXPECT_TRUE(head.weight.fresh[0]);
    EXPECT_TRUE(head.weight.grads[0].isnan().all().item<bool>());
    EXPECT_TRUE(dh.isfinite().all().item<bool>());
  }
}

TEST(HeadLoss, NoScoredRowsGiveZeroAndLeaveTheGradientFresh) {
  for (bool with_kl : {false, true}) {
    Head head{.rows = 0};
    EXPECT_EQ(head.run(with_kl, 0, at::empty_like(head.h)), 0);
    EXPECT_TRUE(head.weight.fresh[0]);
  }
}

TEST(HeadLoss, TheReferenceModelItselfHasNoDivergence) {
  Head head{.rows = 300};
  head.h_ref = head.h;
  head.reference_weight = head.weight.value;
  at::Tensor dh = at::empty_like(head.h);
  EXPECT_EQ(head.run(true, 0, dh), 0);
  expect_equal(dh, at::zeros_like(dh));
}

TEST(HeadLoss, RunsInBfloat16) {
  Head wide{.rows = 3};
  at::Tensor dh = at::empty_like(wide.h);
  Head narrow{.rows = 3};
  narrow.h = narrow.h.to(at::kBFloat16);
  narrow.weight.value = narrow.weight.value.to(at::kBFloat16);
  for (at::Tensor& g : narrow.weight.grads) g = g.to(at::kBFloat16);
  at::Tensor narrow_dh = at::empty_like(narrow.h);

  const double loss = wide.run(false, 0, dh), narrow_loss = narrow.run(false, 0, narrow_dh);

  // Logits of size 5 are rounded to 8 bits: 2⁻⁸ relative, a few products of that.
  EXPECT_NEAR(narrow_loss, loss, 0.1);
  expect_close(narrow_dh, values_of(dh), 0.1);
  expect_close(narrow.weight.grads[0], values_of(wide.weight.grads[0]), 0.1);
  EXPECT_EQ(narrow_dh.scalar_type(), at::kBFloat16);
}

}  // namespace
}  // namespace safegrad
