#include "core/update.h"

#include <algorithm>
#include <array>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace safegrad {
namespace {

// The sum's order is fixed by these sizes alone, never by the number of threads.
constexpr int64_t kGramBlock = 1 << 16;
constexpr int64_t kUpdateGrain = 1 << 14;
constexpr int64_t kUpdateBlock = 2048;

double inner_product(const float* a, const float* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

}  // namespace

void add_inner_products(const std::vector<at::Tensor>& gradients, Gram& gram) {
  const int64_t n = gradients[0].numel();
  const int64_t blocks = (n + kGramBlock - 1) / kGramBlock;
  std::vector<Gram> partial(static_cast<size_t>(blocks), Gram(gram.size));
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kGramBlock, length = std::min(kGramBlock, n - begin);
      for (size_t i = 0; i < gram.size; ++i) {
        for (size_t j = i; j < gram.size; ++j) {
          partial[static_cast<size_t>(block)].at(i, j) =
              inner_product(gradients[i].data_ptr<float>() + begin,
                            gradients[j].data_ptr<float>() + begin, length);
        }
      }
    }
  });
  for (const Gram& p : partial) {
    for (size_t i = 0; i < gram.size; ++i) {
      for (size_t j = 0; j < gram.size; ++j) gram.at(i, j) += p.at(std::min(i, j), std::max(i, j));
    }
  }
}

void fused_update(const std::vector<at::Tensor>& gradients, const std::vector<double>& coefficients,
                  const AdamW& adamw, int64_t begin, int64_t end, at::Tensor& master, at::Tensor& m,
                  at::Tensor& v) {
  float* p = master.data_ptr<float>();
  float* first = m.data_ptr<float>();
  float* second = v.data_ptr<float>();
  at::parallel_for(begin, end, kUpdateGrain, [&](int64_t from, int64_t to) {
    std::array<float, kUpdateBlock> g;  // stays in the first-level cache: memory is swept once
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
      for (int64_t i = 0; i < n; ++i) adamw(g[i], first[b + i], second[b + i], p[b + i]);
    }
  });
}

}  // namespace safegrad
