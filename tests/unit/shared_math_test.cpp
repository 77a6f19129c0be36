// The arithmetic that CPU loops and CUDA kernels share, element by element against LibTorch in
// fp64.
#include <gtest/gtest.h>

#include "core/layer_math.h"
#include "core/loss_math.h"
#include "unit/numbers.h"

namespace safegrad {
namespace {

using test::random_tensor;
using test::Values;
using test::values_of;

at::Tensor wide(const at::Tensor& x) {
  return x.to(at::kDouble).requires_grad_();
}

TEST(NormMath, IsTheFormulaAndItsGradient) {
  const at::Tensor x = random_tensor({64}, 1), w = random_tensor({64}, 2),
                   dy = random_tensor({64}, 3);
  at::Tensor wide_x = wide(x), wide_w = wide(w);
  const at::Tensor y = wide_x * (wide_x.square().mean() + 1e-2).rsqrt() * wide_w;
  y.backward(dy.to(at::kDouble));
  const Values y_expected = values_of(y.detach()), dx = values_of(wide_x.grad());
  const Values dw = values_of(wide_w.grad());

  const float *px = x.const_data_ptr<float>(), *pw = w.const_data_ptr<float>();
  const float* pdy = dy.const_data_ptr<float>();
  float square = 0, along = 0;
  for (int i = 0; i < 64; ++i) square += px[i] * px[i], along += pdy[i] * pw[i] * px[i];
  const float rstd = rms_scale(square, 64, 1e-2f);
  const float pull = norm_pull(along, rstd, 1.0f / 64);
  for (size_t i = 0; i < 64; ++i) {
    // Float sums of 64 terms of size 1, then a few operations.
    EXPECT_NEAR(normed(px[i], rstd, pw[i]), y_expected[i], 3e-6);
    EXPECT_NEAR(norm_input_gradient(pdy[i], pw[i], px[i], rstd, pull), dx[i], 3e-6);
    EXPECT_NEAR(norm_weight_gradient(pdy[i], px[i], rstd), dw[i], 3e-6);
  }
}

TEST(RotationMath, TurnsByTheAngleAndBack) {
  float a = 3, b = -2;
  rotate_pair(a, b, 0.6f, 0.8f);
  EXPECT_NEAR(a, 3 * 0.6 + 2 * 0.8, 1e-6);
  EXPECT_NEAR(b, -2 * 0.6 + 3 * 0.8, 1e-6);
  rotate_pair(a, b, 0.6f, -0.8f);
  EXPECT_NEAR(a, 3, 1e-6);
  EXPECT_NEAR(b, -2, 1e-6);
}

TEST(SwigluMath, IsTheFormulaAndItsGradient) {
  const at::Tensor gate = random_tensor({257}, 4) * 4, up = random_tensor({257}, 5);
  const at::Tensor dact = random_tensor({257}, 6);
  at::Tensor wide_gate = wide(gate), wide_up = wide(up);
  const at::Tensor act = wide_gate * wide_gate.sigmoid() * wide_up;
  act.backward(dact.to(at::kDouble));
  const Values expected = values_of(act.detach()), dgate = values_of(wide_gate.grad());
  const Values dup = values_of(wide_up.grad());
  for (size_t i = 0; i < 257; ++i) {
    const float g = gate.const_data_ptr<float>()[i], u = up.const_data_ptr<float>()[i];
    const SwigluGradient got = swiglu_gradient(g, u, dact.const_data_ptr<float>()[i]);
    // The sigmoid is right to 3.5e-7, times values of size up to 12.
    EXPECT_NEAR(got.act, expected[i], 5e-6);
    EXPECT_NEAR(got.dgate, dgate[i], 5e-6);
    EXPECT_NEAR(got.dup, dup[i], 5e-6);
    EXPECT_EQ(swiglu_value(g, u), got.act);
  }
}

// Every split of a row into parts must give the statistics of the whole.
TEST(SoftmaxSums, OfPartsMergeToThoseOfTheRow) {
  const at::Tensor x = random_tensor({64}, 7) * 5;
  const double lse = x.to(at::kDouble).logsumexp(0).item<double>();
  const float* p = x.const_data_ptr<float>();
  for (int cut : {0, 1, 13, 63, 64}) {
    SoftmaxSums left = SoftmaxSums::none(), right = SoftmaxSums::none();
    for (int i = 0; i < 64; ++i) {
      const float one[1] = {p[i]};
      (i < cut ? left : right).add(one);
    }
    left.merge(right);
    EXPECT_EQ(left.top, x.max().item<float>());
    EXPECT_NEAR(cross_entropy_loss(left.sum, left.top, p[3]), lse - p[3], 1e-6);
  }
}

KlSums sums_of(const float* x, const float* r, int begin, int end) {
  KlSums sums = KlSums::none();
  for (; begin + 4 <= end; begin += 4) {
    float a[4], b[4];
    std::copy(x + begin, x + begin + 4, a);
    std::copy(r + begin, r + begin + 4, b);
    sums.add(a, b);
  }
  return sums;
}

TEST(KlSums, OfPartsMergeToThoseOfTheRowAndKeepSmallDigits) {
  for (double distance : {1.0, 1e-2, 1e-4}) {
    const at::Tensor x = random_tensor({64}, 8) * 3, r = x + random_tensor({64}, 9) * distance;
    const at::Tensor log_p = x.to(at::kDouble).log_softmax(0);
    const at::Tensor log_r = r.to(at::kDouble).log_softmax(0);
    const double expected = (log_r.exp() * (log_r - log_p)).sum().item<double>();
    for (int cut : {0, 4, 32, 64}) {
      const float *px = x.const_data_ptr<float>(), *pr = r.const_data_ptr<float>();
      KlSums sums = sums_of(px, pr, 0, cut);
      sums.merge(sums_of(px, pr, cut, 64));
      const double kl = kl_loss(sums.model.sum, sums.reference.sum, sums.weighted);
      // Relative to what is summed, |d| = distance: the KL itself is of size distance² / 2. The
      // sums of size 1 behind the logarithm are right to about 1e-7.
      EXPECT_NEAR(kl, expected, 1e-6 * distance + 2e-7) << distance << ", " << cut;
    }
  }
}

TEST(KlSums, OfEqualLogitsAreEqualBitForBit) {
  const at::Tensor x = random_tensor({64}, 10) * 5;
  const float* p = x.const_data_ptr<float>();
  KlSums sums = sums_of(p, p, 0, 32);
  sums.merge(sums_of(p, p, 32, 64));
  EXPECT_EQ(sums.model.sum, sums.reference.sum);
  EXPECT_EQ(sums.weighted, 0);
  EXPECT_EQ(kl_loss(sums.model.sum, sums.reference.sum, sums.weighted), 0);
  EXPECT_EQ(kl_gradient(0.3f, 0.3f, sums.reference.sum / sums.model.sum, 0.7f), 0);
}

TEST(DropoutDraw, KeepsTheExpectedValueAndDrawsAThresholdOf16Bits) {
  const DropoutDraw draw = DropoutDraw::of(0.25);
  EXPECT_EQ(draw.threshold, 16384u);
  EXPECT_FLOAT_EQ(draw.keep, 1 / 0.75f);
  const RandomBits bits{{0x4000'3FFFu, 0, 0xFFFF'FFFFu, 0}};
  EXPECT_EQ(draw.scale(bits, 0), 0.0f);  // 0x3FFF < 0x4000: dropped
  EXPECT_EQ(draw.scale(bits, 1), draw.keep);
  EXPECT_EQ(draw.scale(bits, 4), draw.keep);
  EXPECT_EQ(draw.scale(bits, 7), 0.0f);
}

TEST(GramTerm, IsTheExactProduct) {
  const float a = 1.0f + 0x1p-23f, b = 1.0f - 0x1p-24f;
  EXPECT_EQ(gram_term(a, b), 1.0 + 0x1p-24 - 0x1p-47);
}

}  // namespace
}  // namespace safegrad
