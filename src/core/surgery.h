// surgery.h: turns inner products of gradients into the coefficients of their combination (pure, no
// tensors).
#pragma once
#include <cstddef>
#include <vector>

#include "core/config.h"

namespace safegrad {

/// Inner products g_i·g_j of K gradients over every trainable parameter of every rank, fp64,
/// row-major [K, K].
struct Gram {
  explicit Gram(size_t objectives = 0) : size(objectives), values(objectives * objectives, 0.0) {}
  double& at(size_t i, size_t j) { return values[i * size + j]; }
  double at(size_t i, size_t j) const { return values[i * size + j]; }
  bool finite() const;

  size_t size;
  std::vector<double> values;
};

struct RuleOptions {
  Rule rule = Rule::safegrad;
  double rho = 1.0;
  double cagrad_c = 0.4;
};

/// No projection while a·a is at most this: at θ = θ_ref the KL and its gradient are zero (the
/// authors' guard).
inline constexpr double kProjectionGuard = 1e-9;

/// Coefficients c with update g = Σ c_k g_k, for gradients that are means per token; objective 0 is
/// the task, 1 the alignment.
///   sft            (1, 0)
///   weighted_sum   (1, ρ)
///   safegrad       (1, ρ − min(u·a, 0) / a·a)                       arXiv:2508.07172 Eq. 3–5
///   agem           (1, −min(u·a, 0) / a·a)                          arXiv:1812.00420
///   pcgrad         each side projected on conflict, then summed     arXiv:2001.06782
///   mgda           least-norm point of the segment between u and a  arXiv:1810.04650
///   cagrad         conflict-averse direction, radius c              arXiv:2110.14048
///   ogpsa          (1, −u·a / a·a), both signs                      arXiv:2602.07892
/// lisa is none of them: its steps have one gradient. One objective: (1) whatever the rule. Pure:
/// ranks that hold the same Gram matrix return the same bits. The alignment coefficient may be huge
/// while a·a is tiny: the removed part is bounded by |u|, so it is not clipped. Throws UsageError
/// for lisa, and unless K is 1 or 2.
std::vector<double> combine(const Gram& gram, const RuleOptions& options);

/// |Σ c_k g_k| from the Gram matrix alone.
double combined_norm(const Gram& gram, const std::vector<double>& coefficients);

/// Layer-wise surgery: combine() of each block by itself. A block without gradients (frozen) gets
/// the rule's coefficients for zeros.
std::vector<std::vector<double>> combine_blocks(const std::vector<Gram>& blocks,
                                                const RuleOptions& options);

/// Norm of the whole update: the root of Σ over blocks of |Σ_k c_bk g_bk|², of which blocks are
/// disjoint parts.
double combined_norm(const std::vector<Gram>& blocks,
                     const std::vector<std::vector<double>>& coefficients);

/// Cosine between objectives 0 and 1; 0 if either gradient is zero.
double cosine(const Gram& gram);

/// min(1, clip_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; 1 if clip_norm is 0 (off).
double clip_factor(double norm, double clip_norm);

}  // namespace safegrad
