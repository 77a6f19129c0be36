// attribution.h: finds out which part of a step broke, after the ranks know that it did.
#pragma once
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/not_finite.h"
#include "core/planner.h"
#include "dist/mesh.h"
#include "dist/sharded_unit.h"

namespace safegrad::dist {

/// `loss` [K] and `unit_grams` [units, K, K], f64 on the device: this rank's, as they entered the
/// step's sums. One gather of K (1 + units) scalars; the result is the same on all ranks. Samples
/// are those of `plan`.
NotFinite attribute(Mesh& mesh, const at::Tensor& loss, const at::Tensor& unit_grams,
                    const std::vector<ShardedUnit>& units, const StepPlan& plan);

}  // namespace safegrad::dist
