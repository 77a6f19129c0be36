// The layer kernels of src/cuda against LibTorch in fp64, whose autograd gives the gradients.
#include <gtest/gtest.h>

#include "core/error.h"
#include "cpu/cpu_kernels.h"
#include "cuda/any_order.h"
#include "cuda/sparse_memory.h"

namespace safegrad::test {
namespace {

struct Shape {
  int64_t rows, width;
};
// One lane to several warps a row, one row or several a block; 7 and odd strides element by
// element.
const Shape kShapes[] = {{0, 576}, {1, 1},    {3, 7},    {300, 7},    {3, 128},   {300, 128},
                         {3, 576}, {3, 1000}, {3, 4104}, {300, 1000}, {300, 4104}};
// More rows than blocks: a block of the norm's backward goes through several, or several at once.
const Shape kManyRows[] = {{1700, 1000}, {7000, 128}};

at::Tensor norm_of(const at::Tensor& x, const at::Tensor& w, double eps) {
  return x * (x.square().mean(1, true) + eps).rsqrt() * w;
}

TEST(CudaRmsNorm, MatchesFp64) {
  for (at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : kShapes) {
      const at::Tensor x = random_of(type, {rows, width}, 1), w = random_of(type, {width}, 2);
      const at::Tensor expected = norm_of(x.to(at::kDouble), w.to(at::kDouble), 1e-5);
      const at::Tensor rstd_expected = (x.to(at::kDouble).square().mean(1) + 1e-5).rsqrt();
      for (const at::Tensor& from : {x, strided(x), strided_aligned(x)}) {
        const auto got = in_any_order([&] {
          at::Tensor rstd;
          at::Tensor y = kernels().rms_norm(from, w, 1e-5, rstd);
          return std::vector<at::Tensor>{y, rstd};
        });
        // Float: lanes add up to 16 squares each, then a tree; a root, two products.
        expect_within(got[0], expected, rounding(type) + 1e-6, 1e-7);
        expect_within(got[1], rstd_expected, 1e-6, 0);
        EXPECT_TRUE(got[0].is_contiguous());
      }
    }
  }
}

Parameter norm_weight(const at::Tensor& value, const std::vector<at::Tensor>& grads,
                      const std::vector<bool>& fresh) {
  Parameter p;
  p.shape = {value.numel()};
  p.value = value;
  for (const at::Tensor& g : grads) p.grads.push_back(g.clone());
  p.fresh = fresh;
  return p;
}

// Objective 0 overwrites what is there (a NaN, so that reading it shows), 1 has no rows, 2 adds.
TEST(CudaRmsNormBackward, MatchesAutogradInFp64AndSplitsTheWeightGradientByObjective) {
  const double eps = 1e-2;  // large enough to matter
  std::vector<Shape> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.insert(shapes.end(), std::begin(kManyRows), std::end(kManyRows));
  for (at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : shapes) {
      const at::Tensor x = random_of(type, {rows, width}, 3), w = random_of(type, {width}, 4);
      const at::Tensor dy = random_of(type, {rows, width}, 5),
                       start = random_of(type, x.sizes(), 6);
      const at::Tensor before = random_of(type, {width}, 7);
      const std::vector<int64_t> segments = {0, rows / 3, rows / 3, rows};
      at::Tensor rstd;
      kernels().rms_norm(x, w, eps, rstd);
      at::Tensor wide_x = x.to(at::kDouble).requires_grad_(), wide_w = w.to(at::kDouble);
      norm_of(wide_x, wide_w, eps).backward(dy.to(at::kDouble));

      for (int layout = 0; layout < 3; ++layout) {
        const auto lay = [&](const at::Tensor& t) {
          return layout == 0 ? t.clone() : layout == 1 ? strided(t) : strided_aligned(t);
        };
        const auto got = in_any_order([&] {
          Parameter weight = norm_weight(w, {at::full_like(w, NAN), at::full_like(w, 5), before},
                                         {true, true, false});
          at::Tensor dx = lay(start);
          kernels().rms_norm_backward(lay(dy), lay(x), rstd, weight, segments, dx);
          EXPECT_EQ(weight.fresh, (std::vector<bool>{rows / 3 == 0, true, false}));
          return std::vector<at::Tensor>{dx, weight.grads[0], weight.grads[1], weight.grads[2]};
        });
        // A float sum of `width` products of size 1 over `width`, times a root of up to 10 for a
        // row of one element.
        expect_within(got[0], start.to(at::kDouble) + wide_x.grad(), rounding(type), 2e-5);
        EXPECT_TRUE(same_bits(got[2], at::full_like(w, 5)));
        for (size_t k : {0, 2}) {
          const int64_t begin = segments[k], n = segments[k + 1] - begin;
          if (n == 0) continue;
          at::Tensor own_w = w.to(at::kDouble).requires_grad_();
          norm_of(x.to(at::kDouble).narrow(0, begin, n), own_w, eps)
              .backward(dy.to(at::kDouble).narrow(0, begin, n));
          const at::Tensor added = k == 0 ? own_w.grad() : own_w.grad() + before.to(at::kDouble);
          // Every addition rounds a sum of products of size 1, which grows with the root of n.
          const double roundings = 2e-5 * std::sqrt(std::max(1.0, static_cast<double>(n) / 200));
          expect_within(got[k == 0 ? 1 : 3], added, rounding(type), roundings);
        }
      }
    }
  }
}

TEST(CudaRmsNormBackward, WeightGradientsMayBeFloatForBfloat16Rows) {
  const at::Tensor x = random_of(at::kBFloat16, {300, 576}, 8),
                   w = random_of(at::kBFloat16, {576}, 9);
  at::Tensor rstd, dx = at::zeros_like(x);
  kernels().rms_norm(x, w, 1e-5, rstd);
  Parameter weight = norm_weight(w, {at::full({576}, NAN, at::kFloat)}, {true});
  kernels().rms_norm_backward(x, x, rstd, weight, {0, 300}, dx);
  const at::Tensor wide = x.to(at::kDouble);
  const at::Tensor expected = (wide.square() * (wide.square().mean(1, true) + 1e-5).rsqrt()).sum(0);
  expect_within(weight.grads[0], expected, 1e-6, 0);  // a sum of 300 positive terms
}

TEST(CudaRmsNormBackward, AFrozenWeightTakesNoGradient) {
  const at::Tensor x = random_tensor({3, 7}, 10), w = at::ones({7});
  Parameter weight = norm_weight(w, {at::full({7}, NAN, at::kFloat)}, {true});
  weight.trainable = false;
  at::Tensor rstd, dx = at::zeros({3, 7});
  kernels().rms_norm(x, w, 1e-5, rstd);
  const int64_t before = emulation::launches();
  kernels().rms_norm_backward(x, x, rstd, weight, {0, 3}, dx);
  EXPECT_EQ(emulation::launches() - before, 1);
  EXPECT_TRUE(weight.fresh[0]);
  EXPECT_TRUE(dx.isfinite().all().item<bool>());
}

TEST(CudaRmsNorm, RefusesWhatItCannotHold) {
  at::Tensor rstd;
  EXPECT_THROW(kernels().rms_norm(at::ones({1, 8200}), at::ones({8200}), 1e-5, rstd), UsageError);
  EXPECT_THROW(kernels().rms_norm(at::ones({1, 8}, at::kHalf), at::ones({8}, at::kHalf), 0, rstd),
               UsageError);
  EXPECT_THROW(kernels().rms_norm(at::ones({1, 8}), at::ones({8}, at::kBFloat16), 0, rstd),
               UsageError);
  EXPECT_THROW(kernels().rms_norm(at::ones({8, 8}).t(), at::ones({8}), 0, rstd), UsageError);
  at::Tensor widest = kernels().rms_norm(at::ones({1, 8192}), at::ones({8192}), 0, rstd);
  EXPECT_EQ(widest.sum().item<float>(), 8192);
}

// Rows 2³⁰ elements apart: the third begins at the 2³¹st.
TEST(CudaLayers, ReachRowsBeyondThe2To31stElement) {
  constexpr int64_t kStride = int64_t{1} << 30, kWidth = 576;
  const SparseMemory x_memory(2 * (2 * kStride + kWidth)), dx_memory(2 * (2 * kStride + kWidth));
  if (!x_memory.mapped() || !dx_memory.mapped()) {
    GTEST_SKIP() << "the system does not promise 4 GiB";
  }
  const at::Tensor values = random_of(at::kBFloat16, {3, kWidth}, 18);
  const at::Tensor w = random_of(at::kBFloat16, {kWidth}, 19);
  at::Tensor far = x_memory.tensor({3, kWidth}, {kStride, 1}, at::kBFloat16);
  at::Tensor far_dx = dx_memory.tensor({3, kWidth}, {kStride, 1}, at::kBFloat16);
  far.copy_(values);
  at::Tensor near = values.clone(), dx = at::zeros_like(values), rstd, far_rstd;

  EXPECT_TRUE(same_bits(kernels().rms_norm(far, w, 1e-5, far_rstd),
                        kernels().rms_norm(near, w, 1e-5, rstd)));
  Parameter weight = norm_weight(w, {}, {});
  kernels().rms_norm_backward(far, far, rstd, weight, {0, 3}, far_dx);
  kernels().rms_norm_backward(near, near, rstd, weight, {0, 3}, dx);
  EXPECT_TRUE(same_bits(far_dx, dx));
  EXPECT_TRUE(dx.narrow(0, 2, 1).ne(0).any().item<bool>());

  const at::Tensor angles = random_tensor({4, 32}, 20), positions = indices({1, 0, 3});
  for (const at::Tensor& x : {far, near}) {
    kernels().rotate(x.view({3, 9, 64}), positions, angles.cos(), angles.sin(), false);
  }
  EXPECT_TRUE(same_bits(far, near));
  EXPECT_FALSE(same_bits(near, values));
}

TEST(CudaRotate, TurnsPairsInPlaceAndLeavesTheRest) {
  struct Case {
    int64_t tokens, heads, width, rest;  // rest: columns of the matrix beside the heads
  };
  for (at::ScalarType type : kTypes) {
    for (const auto& [tokens, heads, width, rest] :
         {Case{0, 2, 64, 0}, Case{1, 1, 2, 1}, Case{3, 3, 6, 4}, Case{300, 2, 64, 8},
          Case{3, 9, 128, 5}, Case{3, 40, 128, 16}, Case{3, 2, 256, 0}}) {
      const at::Tensor x = random_of(type, {tokens, heads * width + rest}, 11);
      const at::Tensor positions = random_integers(tokens, 0, 400, 30);
      const at::Tensor angles = random_tensor({400, width / 2}, 12) * 3;
      const at::Tensor cos = angles.cos(), sin = angles.sin();
      for (bool inverse : {false, true}) {
        const auto got = in_any_order([&] {
          at::Tensor y = x.clone();
          kernels().rotate(y.narrow(1, 0, heads * width).view({tokens, heads, width}), positions,
                           cos, sin, inverse);
          return std::vector<at::Tensor>{y};
        });
        at::Tensor expected = x.to(at::kDouble);
        at::Tensor turned = expected.narrow(1, 0, heads * width).view({tokens, heads, width});
        const at::Tensor c = cos.to(at::kDouble).index_select(0, positions).unsqueeze(1);
        const at::Tensor s =
            sin.to(at::kDouble).index_select(0, positions).unsqueeze(1) * (inverse ? -1 : 1);
        const at::Tensor low = turned.narrow(2, 0, width / 2).clone();
        const at::Tensor high = turned.narrow(2, width / 2, width / 2).clone();
        turned.copy_(at::cat({low * c - high * s, high * c + low * s}, 2));
        expect_within(got[0], expected, rounding(type), 1e-6);  // two products of size up to 4
      }
    }
  }
}

at::Tensor swiglu_of(const at::Tensor& gate_up) {
  const int64_t width = gate_up.size(1) / 2;
  const at::Tensor gate = gate_up.narrow(1, 0, width), up = gate_up.narrow(1, width, width);
  return gate * gate.sigmoid() * up;
}

TEST(CudaSwiglu, MatchesAutogradInFp64AndTheBackwardRecomputesTheForward) {
  for (at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : kShapes) {
      const at::Tensor gate_up = random_of(type, {rows, 2 * width}, 13, 4);
      const at::Tensor dact = random_of(type, {rows, width}, 14);
      at::Tensor wide = gate_up.to(at::kDouble).requires_grad_();
      const at::Tensor expected = swiglu_of(wide);
      expected.backward(dact.to(at::kDouble));
      const auto got = in_any_order([&] {
        at::Tensor dgate_up, act;
        kernels().swiglu_backward(dact, gate_up, dgate_up, act);
        return std::vector<at::Tensor>{kernels().swiglu(gate_up), act, dgate_up};
      });
      // The sigmoid is right to 3.5e-7; a few products of that.
      expect_within(got[0], expected.detach(), rounding(type) + 1e-6, 1e-7);
      EXPECT_TRUE(same_bits(got[0], got[1]));
      expect_within(got[2], wide.grad(), rounding(type) + 2e-6, 2e-5);  // values of size up to 16
    }
  }
}

TEST(CudaSwiglu, LargeGatesSaturateWithoutNaN) {
  const at::Tensor gate_up = at::tensor({500.0f, -500.0f, 0.0f, 2.0f, 2.0f, 2.0f}).view({1, 6});
  at::Tensor dgate_up, act;
  kernels().swiglu_backward(at::ones({1, 3}), gate_up, dgate_up, act);
  expect_close(act, {1000, 0, 0}, 1e-6);
  expect_close(dgate_up, {2, 0, 1, 500, 0, 0}, 1e-6);
}

// float64 products of floats are exact; what rounds is their sum.
TEST(CudaRowProducts, AddToTheSumsOfFp64) {
  for (at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : kShapes) {
      const at::Tensor a = random_of(type, {rows, width}, 51),
                       b = random_of(type, {rows, width}, 52);
      const at::Tensor before = random_of(at::kFloat, {rows}, 53).to(at::kDouble);
      const at::Tensor products = a.to(at::kDouble) * b.to(at::kDouble);
      for (const at::Tensor& left : {a, strided(a), strided_aligned(a)}) {
        const auto got = in_any_order([&] {
          at::Tensor sums = before.clone();
          kernels().add_row_products(left, b, -0.5, sums);
          return std::vector<at::Tensor>{sums};
        });
        expect_within(got[0], before - 0.5 * products.sum(1), 1e-12, 1e-12 * width);
      }
    }
  }
}

TEST(CudaRowProducts, ARowMayBeRepeated) {
  const at::Tensor a = random_tensor({5, 128}, 54), b = random_tensor({128}, 55);
  at::Tensor sums = at::zeros({5}, at::kDouble);
  kernels().add_row_products(a, b.expand_as(a), 1.0, sums);
  expect_within(sums, a.to(at::kDouble).mv(b.to(at::kDouble)), 0, 1e-12);
}

// The draws are the contract of layouts and devices: bit for bit those of the CPU.
TEST(CudaDropout, EqualsTheCpuBitForBit) {
  for (at::ScalarType type : kTypes) {
    for (const auto& [rows, width] : kShapes) {
      const at::Tensor x = random_of(type, {rows, width}, 15);
      PackedBatch batch;
      batch.dropout_keys = random_integers(rows, INT64_MIN, INT64_MAX, 31);
      batch.positions = random_integers(rows, 0, 5000, 32);
      for (double p : {0.0, 0.1, 0.5}) {
        const at::Tensor expected = cpu_kernels().dropout(x, batch, p, 17);
        const auto got = in_any_order([&] {
          return std::vector<at::Tensor>{kernels().dropout(x, batch, p, 17),
                                         kernels().dropout(misaligned(x), batch, p, 17)};
        });
        EXPECT_TRUE(same_bits(got[0], expected));
        EXPECT_TRUE(same_bits(got[1], expected));
        if (x.numel() > 1000 && p > 0) {
          EXPECT_FALSE(same_bits(kernels().dropout(x, batch, p, 18), expected));
        }
      }
    }
  }
}

TEST(CudaDropout, RefusesABatchWithoutKeys) {
  PackedBatch batch;
  batch.positions = at::zeros({3}, at::kLong);
  EXPECT_THROW(kernels().dropout(at::ones({3, 8}), batch, 0.1, 1), UsageError);
}

}  // namespace
}  // namespace safegrad::test
