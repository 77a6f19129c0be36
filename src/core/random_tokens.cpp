#include "core/random_tokens.h"

#include <vector>

#include "core/random.h"
#include "core/safetensors.h"

namespace safegrad {

void write_random_tokens(const std::string& path, const RandomTokens& t) {
  const Philox random(t.seed);
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
  std::vector<int64_t> offsets = {0};
  for (int64_t i = 0; i < t.sequences; ++i) {
    for (int64_t j = 0; j < t.length; ++j) {
      const auto bits = random(static_cast<uint64_t>(i), static_cast<uint64_t>(j));
      tokens.push_back(static_cast<int32_t>(bits[0] % static_cast<uint64_t>(t.vocab)));
      mask.push_back(j >= t.length - t.scored);
    }
    offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
  SafetensorsWriter writer(path,
                           {{"tokens", Dtype::i32, {static_cast<int64_t>(tokens.size())}},
                            {"loss_mask", Dtype::u8, {static_cast<int64_t>(mask.size())}},
                            {"offsets", Dtype::i64, {t.sequences + 1}}},
                           {{"format", "safegrad.tokens/1"}});
  writer.append(std::as_bytes(std::span(tokens)));
  writer.append(std::as_bytes(std::span(mask)));
  writer.append(std::as_bytes(std::span(offsets)));
  writer.finish();
}

}  // namespace safegrad
