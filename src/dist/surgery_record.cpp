#include "dist/surgery_record.h"

#include <algorithm>

namespace safegrad::dist {
namespace {

using Coefficients = std::vector<std::vector<double>>;  // by block

double mean(const Coefficients& coefficients, size_t k, const Blocks& blocks) {
  double sum = 0;
  for (size_t b : blocks.trained) sum += coefficients[b][k];
  return sum / static_cast<double>(blocks.trained.size());
}

BlockCoefficients range_of(const Coefficients& coefficients, const std::vector<Gram>& block_grams,
                           const Blocks& blocks) {
  BlockCoefficients range;
  for (size_t b : blocks.trained) {
    range.conflicts += block_grams[b].at(0, 1) < 0;
    for (size_t k = 0; k < 2; ++k) {
      std::array<double, 2>& bounds = k == 0 ? range.task : range.align;
      const double c = coefficients[b][k];
      const bool first = b == blocks.trained.front();
      bounds = {first ? c : std::min(bounds[0], c), first ? c : std::max(bounds[1], c)};
    }
  }
  return range;
}

void describe_blocks(StepRecord& record, const std::vector<Gram>& block_grams,
                     const Coefficients& coefficients, const Blocks& blocks) {
  for (size_t b = 0; b < block_grams.size(); ++b) {
    const Gram& g = block_grams[b];
    record.blocks[blocks.names[b]] = {{"uu", g.at(0, 0)}, {"ua", g.at(0, 1)}, {"aa", g.at(1, 1)}};
  }
  if (!record.block_coefficients) return;
  for (size_t b : blocks.trained) {
    record.blocks[blocks.names[b]]["c_task"] = coefficients[b][0];
    record.blocks[blocks.names[b]]["c_align"] = coefficients[b][1];
  }
}

}  // namespace

void describe_surgery(StepRecord& record, const ObjectiveSection& objective, const Gram& gram,
                      const std::vector<Gram>& block_grams, const Coefficients& coefficients,
                      const Blocks& blocks) {
  const bool layer_wise = objective.surgery == Surgery::block;
  auto of_all = [&](size_t k) {
    return layer_wise ? mean(coefficients, k, blocks) : coefficients.front()[k];
  };
  record.uu = gram.at(0, 0);
  if (!record.skipped) record.c_task = of_all(0);
  if (gram.size < 2) return;
  record.ua = gram.at(0, 1);
  record.aa = gram.at(1, 1);
  record.cosine = cosine(gram);
  record.conflict = gram.at(0, 1) < 0;
  if (!record.skipped) record.c_align = of_all(1);
  if (layer_wise && !record.skipped)
    record.block_coefficients = range_of(coefficients, block_grams, blocks);
  if (objective.gram_per_block) describe_blocks(record, block_grams, coefficients, blocks);
}

}  // namespace safegrad::dist
