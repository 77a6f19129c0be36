// update.h: what happens on a shard after the reduction: inner products, and the fused combine +
// clip + AdamW step.
#pragma once
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/surgery.h"
#include "core/vector_math.h"

namespace safegrad {

/// gram += [g_i·g_j] of K shards [S] f32, products and sums in fp64 in a fixed order: the same bits
/// every run.
void add_inner_products(const std::vector<at::Tensor>& gradients, Gram& gram);

/// One pass over [begin, end) of a shard: g = Σ c_k g_k, then AdamW on master (f32), m, v.
/// `coefficients` hold the rule's coefficients times the clip factor, divided by the objectives'
/// token counts.
void fused_update(const std::vector<at::Tensor>& gradients, const std::vector<double>& coefficients,
                  const AdamW& adamw, int64_t begin, int64_t end, at::Tensor& master, at::Tensor& m,
                  at::Tensor& v);

}  // namespace safegrad
