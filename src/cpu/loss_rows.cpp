// loss_rows.cpp: logits, and losses of rows of logits with the gradient written over them.

#include <algorithm>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/kernel_memory.h"
#include "core/loss_math.h"
#include "cpu/cpu_kernels.h"

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
  const float target_logit = x[target];
  const double sum = exponentiate(x, n, shift);
  const float scale = static_cast<float>(1.0 / sum);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
  x[target] -= 1.0f;
  return cross_entropy_loss(sum, shift, target_logit);
}

// As KlSums, with the maxima known before the sums begin.
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
  const float ratio = static_cast<float>(ref_sum / sum), scale = static_cast<float>(1.0 / ref_sum);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = kl_gradient(x[i], ref[i], ratio, scale);
  return kl_loss(sum, ref_sum, weighted);
}

// Words of the vocabulary whose logits are computed at a time: a block of the output matrix then
// stays in the cache while it is multiplied (8 % less time than in one product, 255 rows).
constexpr int64_t kWordBlock = 2048;

// loss[0] += the sum of row(i) over [0, n) in row order, whatever the number of threads.
template <typename RowLoss>
void add_losses(int64_t n, at::Tensor& loss, const RowLoss& row) {
  std::vector<double> losses(static_cast<size_t>(n));
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) losses[static_cast<size_t>(i)] = row(i);
  });
  double sum = 0;
  for (double l : losses) sum += l;
  *loss.data_ptr<double>() += sum;
}

}  // namespace

int64_t CpuKernels::head_chunk() const {
  return kCpuHeadChunk;
}

at::Tensor CpuKernels::logits(const at::Tensor& h, const at::Tensor& weight) const {
  const int64_t words = weight.size(0);
  at::Tensor logits = at::empty({h.size(0), words}, h.options());
  for (int64_t begin = 0; begin < words; begin += kWordBlock) {
    const int64_t n = std::min(kWordBlock, words - begin);
    at::Tensor block = logits.narrow(1, begin, n);
    at::mm_out(block, h, weight.narrow(0, begin, n).t());
  }
  return logits.to(at::kFloat);
}

void CpuKernels::cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets,
                                    at::Tensor& loss) const {
  const int64_t width = logits.size(1);
  float* x = logits.data_ptr<float>();
  const int64_t* target = targets.data_ptr<int64_t>();
  add_losses(logits.size(0), loss,
             [&](int64_t i) { return cross_entropy_row(x + i * width, width, target[i]); });
}

void CpuKernels::kl_rows(at::Tensor& logits, at::Tensor& reference, at::Tensor& loss) const {
  const int64_t width = logits.size(1);
  float* x = logits.data_ptr<float>();
  float* ref = reference.data_ptr<float>();
  add_losses(logits.size(0), loss,
             [&](int64_t i) { return kl_row(x + i * width, ref + i * width, width); });
}

}  // namespace safegrad
