// step_scalars.h: a step's only exchange of scalars.
#pragma once
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/surgery.h"
#include "dist/engine.h"
#include "dist/mesh.h"

namespace safegrad::dist {

/// What ranks tell each other along with a step's scalars; what one says holds for all.
struct Notice {
  bool stop = false;     ///< somebody asked this rank to stop
  bool writing = false;  ///< it is still writing a checkpoint
};

/// What all ranks know of a step once they have exchanged its scalars; the same bits on each.
struct StepScalars {
  std::vector<double> loss;  ///< [K], summed over scored positions
  double flops = 0;
  int64_t memory_bytes = 0;  ///< of the fullest rank
  Notice notice;             ///< of all ranks, joined
  Gram gram;                 ///< of gradients summed over tokens; see to_means
  std::vector<Gram> block_grams;
  bool finite = true;          ///< all of these
  std::vector<double> scores;  ///< [ranks, slots] of the ranks' task sequences; empty: none
};

/// `block_grams`: Engine::inner_products() of this rank, [blocks, K, K]; they travel themselves,
/// beside their sum, where `per_block`. Where sequences were scored, every rank sends `score_slots`
/// scores, which no rank has more of. One gather of K + 4 + K² (1 + blocks) + slots scalars, the
/// only time in a step that the host waits for a GPU.
StepScalars exchange_scalars(Engine& engine, Mesh& mesh, const PassSums& sums,
                             const at::Tensor& block_grams, bool per_block, const Notice& own,
                             int64_t score_slots);

/// Inner products of gradients summed over tokens [K] -> of gradients that are means per token.
void to_means(StepScalars& scalars, const std::vector<double>& tokens);

}  // namespace safegrad::dist
