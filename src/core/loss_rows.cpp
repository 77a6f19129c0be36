#include "core/loss_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/vector_math.h"

namespace safegrad {
namespace {

// Blocks bound the length of a float accumulation; across blocks the sum is in double.
constexpr int64_t kBlock = 2048;

float row_max(const float* x, int64_t n) {
  float m = x[0];
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// x <- e^(x - shift); returns the sum.
double exponentiate(float* x, int64_t n, float shift) {
  double sum = 0;
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t end = std::min(n, b + kBlock);
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = b; i < end; ++i) {
      x[i] = exp_f32(x[i] - shift);
      s += x[i];
    }
    sum += s;
  }
  return sum;
}

double cross_entropy_row(float* x, int64_t n, int64_t target) {
  const float shift = row_max(x, n);
  const double target_logit = x[target];
  const double sum = exponentiate(x, n, shift);
  const float scale = static_cast<float>(1.0 / sum);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
  x[target] -= 1.0f;
  return std::log(sum) + shift - target_logit;
}

// With d = x_ref - x:  KL = Σ p_ref d - lse_ref + lse. d is taken relative to the difference of the
// maxima, so that what is summed is small when the two models are close, and a KL near zero keeps
// its digits.
double kl_row(float* x, float* ref, int64_t n) {
  const float shift = row_max(x, n), ref_shift = row_max(ref, n);
  double sum = 0, ref_sum = 0, weighted = 0;
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t end = std::min(n, b + kBlock);
    float s = 0, rs = 0, w = 0;
#pragma omp simd reduction(+ : s, rs, w)
    for (int64_t i = b; i < end; ++i) {
      const float centred = x[i] - shift, ref_centred = ref[i] - ref_shift;
      x[i] = exp_f32(centred);
      ref[i] = exp_f32(ref_centred);
      s += x[i];
      rs += ref[i];
      w += ref[i] * (ref_centred - centred);
    }
    sum += s, ref_sum += rs, weighted += w;
  }
  // Scaled after the difference: equal logits give exactly zero, fused multiply-add or not.
  const float ratio = static_cast<float>(ref_sum / sum), scale = static_cast<float>(1.0 / ref_sum);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] * ratio - ref[i]) * scale;
  return weighted / ref_sum + std::log(sum / ref_sum);
}

// Sums row(i) over [0, n) in row order, whatever the number of threads.
template <typename RowLoss>
double sum_rows(int64_t n, const RowLoss& row) {
  std::vector<double> losses(static_cast<size_t>(n));
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) losses[static_cast<size_t>(i)] = row(i);
  });
  double sum = 0;
  for (double loss : losses) sum += loss;
  return sum;
}

}  // namespace

double cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets) {
  const int64_t width = logits.size(1);
  float* x = logits.data_ptr<float>();
  const int64_t* target = targets.data_ptr<int64_t>();
  return sum_rows(logits.size(0),
                  [&](int64_t i) { return cross_entropy_row(x + i * width, width, target[i]); });
}

double kl_rows(at::Tensor& logits, at::Tensor& reference) {
  const int64_t width = logits.size(1);
  float* x = logits.data_ptr<float>();
  float* ref = reference.data_ptr<float>();
  return sum_rows(logits.size(0),
                  [&](int64_t i) { return kl_row(x + i * width, ref + i * width, width); });
}

at::Tensor log_probabilities(const at::Tensor& logits, const at::Tensor& targets) {
  const at::Tensor chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1);
  return chosen.to(at::kDouble) - logits.logsumexp(1).to(at::kDouble);
}

}  // namespace safegrad
