#include "core/weight_source.h"

#include <algorithm>
#include <array>
#include <bit>

#include "core/random.h"

namespace safegrad {
namespace {

constexpr int64_t kSample = 16;

}  // namespace

uint64_t sampled_fingerprint(const std::vector<Unit>& units, const WeightSource& weights) {
  uint64_t hash = 0;
  std::array<float, kSample> values;
  for (const Unit& unit : units) {
    for (const Parameter* p : unit.parameters) {
      for (const Piece& piece : p->pieces) {
        const int64_t numel = p->numel() / p->shape[0] * piece.rows;
        const int64_t n = std::min(kSample, numel);
        hash = mix64(hash, static_cast<uint64_t>(numel));
        for (const int64_t begin : {int64_t{0}, (numel - n) / 2, numel - n}) {
          weights.read(piece.name, begin, begin + n, values.data());
          for (int64_t i = 0; i < n; ++i)
            hash = mix64(hash, std::bit_cast<uint32_t>(values[static_cast<size_t>(i)]));
        }
      }
    }
  }
  return hash;
}

}  // namespace safegrad
