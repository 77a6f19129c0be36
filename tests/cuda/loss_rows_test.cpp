// The row losses of src/cuda against LibTorch in fp64.
#include <limits>

#include <gtest/gtest.h>

#include "core/error.h"
#include "cuda/any_order.h"

namespace safegrad::test {
namespace {

struct Shape {
  int64_t rows, width;
};
// Vocabularies of less than a warp, of some warps, and of many sweeps of the largest block, whole
// 16-byte accesses and not.
const Shape kShapes[] = {{0, 1000}, {1, 1},    {1, 5},      {3, 5},     {300, 5},
                         {1, 1000}, {3, 1000}, {300, 1000}, {3, 49153}, {2, 152064}};

// A row: exponentials right to 1.5 ulp, float sums of up to 150 terms a thread, then a tree.
constexpr double kRow = 1e-6;
// A probability, relative to itself: x - max, of up to 32 here, is rounded by up to 1e-6 (half the
// spacing of floats there), and the exponential turns that into a relative error.
constexpr double kProbability = 2e-6;

double loss_from(double start, const std::function<void(at::Tensor&)>& add) {
  at::Tensor loss = at::full({1}, start, at::kDouble);
  add(loss);
  return loss.item<double>();
}

TEST(CudaCrossEntropyRows, MatchFp64InLossAndGradient) {
  for (at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : kShapes) {
      const at::Tensor logits = random_of(type, {rows, width}, 1, 4), x = logits.to(at::kDouble);
      const at::Tensor targets = random_integers(rows, 0, width, 20);
      const at::Tensor log_p = x.log_softmax(1);
      const at::Tensor target = at::zeros_like(x).scatter(1, targets.unsqueeze(1), 1.0);
      const double expected = -log_p.gather(1, targets.unsqueeze(1)).sum().item<double>();

      const auto got = in_any_order([&] {
        at::Tensor in_place = logits.clone(), loss = at::full({1}, 10.0, at::kDouble);
        kernels().cross_entropy_rows(in_place, targets, loss);
        return std::vector<at::Tensor>{in_place, loss};
      });

      expect_within(got[0], log_p.exp() - target, rounding(type), kProbability,
                    log_p.exp() + target);
      EXPECT_NEAR(got[1].item<double>(), 10 + expected, kRow * static_cast<double>(rows));
    }
  }
}

TEST(CudaCrossEntropyRows, LargeLogitsNeitherOverflowNorLoseTheLoss) {
  at::Tensor logits = at::tensor({1e4f, 1e4f + 1, -1e4f, 300.0f, -300.0f, 299.0f}).view({2, 3});
  const at::Tensor targets = indices({2, 0});
  const double expected =
      -logits.to(at::kDouble).log_softmax(1).gather(1, targets.unsqueeze(1)).sum().item<double>();
  const double loss =
      loss_from(0, [&](at::Tensor& sum) { kernels().cross_entropy_rows(logits, targets, sum); });
  EXPECT_NEAR(loss, expected, 1e-7 * expected);  // exponentials of 20001 do not matter
  EXPECT_NEAR(logits[0][2].item<float>(), -1, kRow);
}

TEST(CudaCrossEntropyRows, AWordRuledOutByMinusInfinityHasNoProbability) {
  at::Tensor logits = random_tensor({1, 1000}, 2);
  logits[0][3] = -std::numeric_limits<float>::infinity();
  at::Tensor expected = logits.to(at::kDouble).softmax(1);
  expected[0][4] -= 1.0;
  const double loss = loss_from(
      0, [&](at::Tensor& sum) { kernels().cross_entropy_rows(logits, indices({4}), sum); });
  EXPECT_TRUE(std::isfinite(loss));
  expect_within(logits, expected, kProbability, 1e-7);
}

TEST(CudaKlRows, MatchFp64InLossAndGradient) {
  for (at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : kShapes) {
      const at::Tensor logits = random_of(type, {rows, width}, 3, 2);
      const at::Tensor reference = random_of(type, {rows, width}, 4, 2);
      const at::Tensor log_p = logits.to(at::kDouble).log_softmax(1);
      const at::Tensor log_ref = reference.to(at::kDouble).log_softmax(1);
      const double expected = (log_ref.exp() * (log_ref - log_p)).sum().item<double>();

      const auto got = in_any_order([&] {
        at::Tensor in_place = logits.clone(), ref = reference.clone();
        at::Tensor loss = at::full({1}, 10.0, at::kDouble);
        kernels().kl_rows(in_place, ref, loss);
        return std::vector<at::Tensor>{in_place, loss};
      });

      expect_within(got[0], log_p.exp() - log_ref.exp(), rounding(type), kProbability,
                    log_p.exp() + log_ref.exp());
      EXPECT_NEAR(got[1].item<double>(), 10 + expected,
                  kRow * (static_cast<double>(rows) + expected));
    }
  }
}

TEST(CudaKlRows, EqualLogitsGiveExactlyZero) {
  for (at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : kShapes) {
      at::Tensor logits = random_of(type, {rows, width}, 5, 5), reference = logits.clone();
      const double loss =
          loss_from(0, [&](at::Tensor& sum) { kernels().kl_rows(logits, reference, sum); });
      EXPECT_EQ(loss, 0) << rows << " x " << width;
      EXPECT_TRUE(logits.eq(0).all().item<bool>()) << rows << " x " << width;
    }
  }
}

TEST(CudaKlRows, ASmallDivergenceKeepsItsDigits) {
  const at::Tensor start = random_tensor({257, 2049}, 6);
  at::Tensor logits = start + random_tensor({257, 2049}, 7) * 1e-2, reference = start.clone();
  const at::Tensor log_p = logits.to(at::kDouble).log_softmax(1);
  const at::Tensor log_ref = start.to(at::kDouble).log_softmax(1);
  const double expected = (log_ref.exp() * (log_ref - log_p)).sum().item<double>();

  const double loss =
      loss_from(0, [&](at::Tensor& sum) { kernels().kl_rows(logits, reference, sum); });

  ASSERT_NEAR(expected / 257, 0.5e-4, 0.1e-4);   // half the variance of the difference, a row
  EXPECT_NEAR(loss, expected, 1e-3 * expected);  // float sums of size 1, right to 5e-8 on average
}

TEST(CudaLossRows, NotANumberIsNeverSwallowed) {
  for (at::ScalarType type : kTypes) {
    for (float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      for (int64_t width : {65, 1000, 49153}) {
        for (int64_t place : {int64_t{0}, int64_t{3}, width - 1}) {
          at::Tensor logits = random_of(type, {2, width}, 8);
          const at::Tensor good = random_of(type, {2, width}, 9);
          logits[1][place] = bad;
          for (bool in_reference : {false, true}) {
            at::Tensor x = in_reference ? good.clone() : logits.clone();
            at::Tensor ref = in_reference ? logits.clone() : good.clone();
            EXPECT_FALSE(std::isfinite(
                loss_from(0, [&](at::Tensor& sum) { kernels().kl_rows(x, ref, sum); })));
          }
          EXPECT_FALSE(std::isfinite(loss_from(0, [&](at::Tensor& sum) {
            kernels().cross_entropy_rows(logits, indices({1, 1}), sum);
          })));
        }
      }
    }
  }
}

TEST(CudaLossRows, AddTheLossesOfAllRowsInOneFixedOrder) {
  at::Tensor logits = random_tensor({1500, 5}, 10);  // more rows than the last block has threads
  const at::Tensor targets = random_integers(1500, 0, 5, 20);
  const double expected =
      -logits.to(at::kDouble).log_softmax(1).gather(1, targets.unsqueeze(1)).sum().item<double>();
  const auto got = in_any_order([&] {
    at::Tensor x = logits.clone(), loss = at::zeros({1}, at::kDouble);
    kernels().cross_entropy_rows(x, targets, loss);
    return std::vector<at::Tensor>{loss};
  });
  EXPECT_NEAR(got[0].item<double>(), expected, 1500 * kRow);
}

TEST(CudaLogits, StayInTheTypeOfTheirFactors) {
  const at::Tensor h = random_of(at::kBFloat16, {3, 64}, 11),
                   w = random_of(at::kBFloat16, {5, 64}, 12);
  const at::Tensor got = kernels().logits(h, w);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_EQ(kernels().head_chunk(), 1024);
  // Values of size 8: products in float, rounded once, but a CPU may round partial sums.
  expect_within(got, h.to(at::kDouble).matmul(w.to(at::kDouble).t()), 0x1p-7, 0.05);
}

TEST(CudaLossRows, RefuseTensorsTheyCannotRead) {
  at::Tensor loss = at::zeros({1}, at::kDouble), float_loss = at::zeros({1});
  at::Tensor logits = at::ones({3, 5}), columns = at::ones({5, 3}).t();
  EXPECT_THROW(kernels().cross_entropy_rows(columns, indices({0, 0, 0}), loss), UsageError);
  EXPECT_THROW(kernels().cross_entropy_rows(logits, indices({0, 0}), loss), UsageError);
  EXPECT_THROW(kernels().cross_entropy_rows(logits, indices({0, 0, 0}), float_loss), UsageError);
  at::Tensor narrow = at::ones({3, 5}, at::kBFloat16);
  EXPECT_THROW(kernels().kl_rows(logits, narrow, loss), UsageError);
}

}  // namespace
}  // namespace safegrad::test
