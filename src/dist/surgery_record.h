// surgery_record.h: what a step's record says of its gradients and of what the rule made of them.
#pragma once
#include <string>
#include <vector>

#include "core/config.h"
#include "core/metrics.h"
#include "core/surgery.h"

namespace safegrad::dist {

/// The embedding, every decoder block and the head, in the order of Engine::blocks().
struct Blocks {
  std::vector<std::string> names;
  std::vector<size_t> trained;  ///< of these, ascending
};

/// Fills in uu, ua, aa, cosine, conflict and, where `record` is not of a skipped step, the
/// coefficients, of the whole; with layer-wise surgery these are means over the blocks that train,
/// and their range is told as well. With gram_per_block also each block's own. `gram` and
/// `block_grams` are of gradients that are means per token; `coefficients`: by block, before
/// clipping.
void describe_surgery(StepRecord& record, const ObjectiveSection& objective, const Gram& gram,
                      const std::vector<Gram>& block_grams,
                      const std::vector<std::vector<double>>& coefficients, const Blocks& blocks);

}  // namespace safegrad::dist
