// update.cpp: what happens on a shard after the reduction, on the CPU.

#include <algorithm>
#include <array>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/surgery.h"
#include "cpu/cpu_kernels.h"

namespace safegrad {
namespace {

// The sum's order is fixed by these sizes alone, never by the number of threads.
constexpr int64_t kGramBlock = 1 << 16;
constexpr int64_t kUpdateGrain = 1 << 14;
constexpr int64_t kUpdateBlock = 2048;

double inner_product(const float* a, const float* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += gram_term(a[i], b[i]);
  return sum;
}

// One pass over memory: g stays in the first-level cache.
void sweep(const std::vector<at::Tensor>& gradients, const std::vector<double>& coefficients,
           const AdamW& adamw, const UpdateRange& range, const ShardState& shard) {
  float* p = shard.master.data_ptr<float>();
  float* m = shard.m.data_ptr<float>();
  float* v = shard.v.data_ptr<float>();
  at::parallel_for(range.begin, range.end, kUpdateGrain, [&](int64_t from, int64_t to) {
    std::array<float, kUpdateBlock> g;
    for (int64_t b = from; b < to; b += kUpdateBlock) {
      const int64_t n = std::min(kUpdateBlock, to - b);
      g.fill(0.0f);
      for (size_t k = 0; k < gradients.size(); ++k) {
        const float* gk = gradients[k].data_ptr<float>() + b;
        const auto c = static_cast<float>(coefficients[k]);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) g[i] += c * gk[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) adamw(g[i], m[b + i], v[b + i], p[b + i]);
    }
  });
}

}  // namespace

void CpuKernels::add_inner_products(const std::vector<at::Tensor>& gradients,
                                    at::Tensor gram) const {
  const size_t k = gradients.size();
  const int64_t n = gradients[0].numel();
  const int64_t blocks = (n + kGramBlock - 1) / kGramBlock;
  std::vector<Gram> partial(static_cast<size_t>(blocks), Gram(k));
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kGramBlock, length = std::min(kGramBlock, n - begin);
      for (size_t i = 0; i < k; ++i) {
        for (size_t j = i; j < k; ++j) {
          partial[static_cast<size_t>(block)].at(i, j) =
              inner_product(gradients[i].data_ptr<float>() + begin,
                            gradients[j].data_ptr<float>() + begin, length);
        }
      }
    }
  });
  double* sum = gram.data_ptr<double>();
  for (const Gram& p : partial) {
    for (size_t i = 0; i < k; ++i) {
      for (size_t j = 0; j < k; ++j) sum[i * k + j] += p.at(std::min(i, j), std::max(i, j));
    }
  }
}

void CpuKernels::update(const std::vector<at::Tensor>& gradients,
                        const std::vector<double>& coefficients, const AdamW& adamw,
                        const std::vector<UpdateRange>& ranges, const ShardState& shard) const {
  for (const UpdateRange& range : ranges) {
    AdamW element = adamw;
    if (!range.decays) element.decay = 1.0f;
    sweep(gradients, coefficients, element, range, shard);
    if (shard.compute.is_same(shard.master)) continue;
    const int64_t n = range.end - range.begin;
    shard.compute.narrow(0, range.begin, n).copy_(shard.master.narrow(0, range.begin, n));
  }
}

}  // namespace safegrad
