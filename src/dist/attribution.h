// attribution.h: finds out which part of a step broke, after the ranks know that it did.
#pragma once
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/not_finite.h"
#include "core/planner.h"
#include "dist/mesh.h"

namespace safegrad::dist {

/// `loss` [K] and `block_grams` [blocks, K, K], f64 on the device: this rank's, as they entered the
/// step's sums; `blocks` names them. One gather of K (1 + blocks) scalars; the result is the same
/// on all ranks. Samples are those of `plan`.
NotFinite attribute(Mesh& mesh, const at::Tensor& loss, const at::Tensor& block_grams,
                    const std::vector<std::string>& blocks, const StepPlan& plan);

}  // namespace safegrad::dist
