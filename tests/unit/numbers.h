// numbers.h: what numeric tests share: random tensors, comparison with fp64, finite differences.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace safegrad::test {

/// Elements of a tensor in row-major order, in fp64: what references compute with.
using Values = std::vector<double>;

/// Standard normal f32 of this shape.
inline at::Tensor random_tensor(at::IntArrayRef shape, uint64_t seed) {
  at::Tensor result = at::empty(shape, at::kFloat);
  std::mt19937_64 bits(seed);
  std::normal_distribution<double> normal;
  float* data = result.data_ptr<float>();
  for (int64_t i = 0; i < result.numel(); ++i) data[i] = static_cast<float>(normal(bits));
  return result;
}

/// A strided view that holds the values of `x`: columns of a wider tensor filled with 7.
inline at::Tensor strided(const at::Tensor& x) {
  at::Tensor wide = at::full({x.size(0), x.size(1) + 3}, 7.0, x.options());
  at::Tensor view = wide.narrow(1, 2, x.size(1));
  view.copy_(x);
  return view;
}

inline at::Tensor indices(const std::vector<int64_t>& values) {
  return at::tensor(at::ArrayRef<int64_t>(values), at::kLong);
}

inline Values values_of(const at::Tensor& x) {
  const at::Tensor flat = x.to(at::kCPU, at::kDouble).contiguous();
  const double* data = flat.data_ptr<double>();
  return {data, data + flat.numel()};
}

/// Every element within `tolerance` · max(1, |expected|); a NaN is a failure.
inline void expect_close(const at::Tensor& actual, const Values& expected, double tolerance) {
  const Values got = values_of(actual);
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const double allowed = tolerance * std::max(1.0, std::abs(expected[i]));
    ASSERT_TRUE(std::abs(got[i] - expected[i]) <= allowed)
        << "element " << i << ": " << got[i] << ", expected " << expected[i] << " +- " << allowed;
  }
}

/// The same values in every element.
inline void expect_equal(const at::Tensor& actual, const at::Tensor& expected) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  ASSERT_EQ(actual.scalar_type(), expected.scalar_type());
  const Values got = values_of(actual), wanted = values_of(expected);
  for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], wanted[i]) << "element " << i;
}

inline double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// ∂f/∂x_i by central differences in fp64. The step is near the cube root of the precision, where
/// truncation and rounding balance: about ten digits are right for functions of size 1.
inline Values central_differences(const std::function<double(const Values&)>& f, Values x) {
  constexpr double kStep = 1e-5;
  Values gradient(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double at = x[i];
    x[i] = at + kStep;
    const double above = f(x);
    x[i] = at - kStep;
    gradient[i] = (above - f(x)) / (2 * kStep);
    x[i] = at;
  }
  return gradient;
}

}  // namespace safegrad::test
