#include "core/parameter.h"

#include <limits>

#include <gtest/gtest.h>

#include "unit/numbers.h"

namespace safegrad {
namespace {

using test::expect_close;
using test::expect_equal;
using test::random_tensor;
using test::Values;
using test::values_of;

// A parameter whose gradient buffers hold NaN until they are written.
Parameter parameter(std::vector<int64_t> shape) {
  Parameter p;
  p.shape = std::move(shape);
  for (int k = 0; k < 2; ++k) {
    p.grads.push_back(at::full(p.shape, std::numeric_limits<float>::quiet_NaN(), at::kFloat));
    p.fresh.push_back(true);
  }
  return p;
}

// start + scale · dyᵀ x in fp64.
Values product(const at::Tensor& dy, const at::Tensor& x, double scale, Values start) {
  const Values a = values_of(dy), b = values_of(x);
  const auto rows = static_cast<size_t>(dy.size(0)), out = static_cast<size_t>(dy.size(1)),
             in = static_cast<size_t>(x.size(1));
  for (size_t t = 0; t < rows; ++t) {
    for (size_t o = 0; o < out; ++o) {
      for (size_t i = 0; i < in; ++i) start[o * in + i] += scale * a[t * out + o] * b[t * in + i];
    }
  }
  return start;
}

TEST(Parameter, TheFirstProductOverwritesAndLaterOnesAdd) {
  for (int64_t rows : {1, 3, 257}) {
    Parameter p = parameter({5, 64});
    const at::Tensor dy = random_tensor({rows, 5}, 1), x = random_tensor({rows, 64}, 2);
    const Values zeros(5 * 64, 0.0);
    const Values once = product(dy, x, 0.5, zeros), twice = product(dy, x, 2.0, once);

    p.add_product(1, dy, x, 0.5);
    // Float sums of 257 products of size 2, which may cancel: 257 · 2 · 6e-8 at most.
    expect_close(p.grads[1], once, 3e-5);
    p.add_product(1, dy, x, 2.0);
    expect_close(p.grads[1], twice, 3e-5);
    EXPECT_TRUE(p.fresh[0]) << "objective 0 was not written";
    EXPECT_TRUE(p.grads[0].isnan().all().item<bool>());
  }
}

TEST(Parameter, ProductsReadStridedColumns) {
  Parameter p = parameter({5, 3});
  const at::Tensor dy = random_tensor({7, 5}, 1), x = random_tensor({7, 3}, 2);

  p.add_product(0, test::strided(dy), test::strided(x));

  expect_close(p.grads[0], product(dy, x, 1, Values(15, 0.0)), 1e-6);  // 7 products
}

TEST(Parameter, ProductsOfTwoSegmentsAreTheProductOfTheWhole) {
  Parameter p = parameter({5, 3});
  const at::Tensor dy = random_tensor({10, 5}, 1), x = random_tensor({10, 3}, 2);

  p.add_product(0, dy.narrow(0, 0, 4), x.narrow(0, 0, 4));
  p.add_product(1, dy.narrow(0, 4, 6), x.narrow(0, 4, 6));

  const Values whole = product(dy, x, 1, Values(15, 0.0));
  expect_close(p.grads[0] + p.grads[1], whole, 1e-6);  // 10 products
  EXPECT_GT((p.grads[0] - p.grads[1]).abs().max().item<float>(), 0.1f);
}

TEST(Parameter, NoTokensLeaveTheGradientFreshAndSettleMakesItZero) {
  Parameter p = parameter({5, 3});
  p.add_product(0, at::empty({0, 5}), at::empty({0, 3}));
  p.add(1, at::ones({5, 3}));
  EXPECT_TRUE(p.fresh[0]);
  EXPECT_FALSE(p.fresh[1]);

  p.settle();

  expect_equal(p.grads[0], at::zeros({5, 3}));
  expect_equal(p.grads[1], at::ones({5, 3}));
  EXPECT_FALSE(p.fresh[0] || p.fresh[1]);
  p.add(0, at::ones({5, 3}));
  p.add(0, at::ones({5, 3}));
  expect_equal(p.grads[0], at::full({5, 3}, 2.0f));
}

TEST(Parameter, AccumulationGoesOnWhenTheBufferIsNotFresh) {
  Parameter p = parameter({2});
  p.grads[0].fill_(10);
  p.fresh[0] = false;
  p.add(0, at::ones({2}));
  p.settle();
  expect_equal(p.grads[0], at::full({2}, 11.0f));
}

TEST(Parameter, AStartedGradientIsZeroOnce) {
  Parameter p = parameter({2});
  p.started(0).add_(at::ones({2}));
  p.started(0).add_(at::ones({2}));
  expect_equal(p.grads[0], at::full({2}, 2.0f));
}

TEST(Parameter, WantsAGradientOnlyIfTrainableAndLentABuffer) {
  Parameter p = parameter({2});
  EXPECT_TRUE(p.wants(0) && p.wants(1));
  EXPECT_FALSE(p.wants(2));
  p.grads[1].reset();
  EXPECT_FALSE(p.wants(1));
  p.settle();  // an objective without a buffer is left alone
  EXPECT_FALSE(p.grads[1].defined());
  p.trainable = false;
  EXPECT_FALSE(p.wants(0));
}

TEST(Parameter, NumelIsTheProductOfTheShape) {
  EXPECT_EQ(parameter({5, 3}).numel(), 15);
  EXPECT_EQ(parameter({7}).numel(), 7);
}

}  // namespace
}  // namespace safegrad
