#include "models/initial_weights.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "models/rotary.h"

namespace safegrad::models {
namespace {

std::vector<float> read(const WeightSource& source, const std::string& name, int64_t begin,
                        int64_t end) {
  std::vector<float> out(static_cast<size_t>(end - begin), -99.0f);
  source.read(name, begin, end, out.data());
  return out;
}

// A source whose element i is i.
class Counting : public WeightSource {
 public:
  void read(const std::string&, int64_t begin, int64_t end, float* out) const override {
    for (int64_t i = begin; i < end; ++i) out[i - begin] = static_cast<float>(i);
  }
};

FreshAdapters adapters(uint64_t seed) {
  return FreshAdapters(std::make_unique<Counting>(), seed, {{"x.lora_A.weight", 64}});
}

TEST(RandomWeights, RangesGiveTheBitsOfTheWholeWhereverTheyAreCut) {
  const RandomWeights source(1);
  const FreshAdapters fresh = adapters(1);
  const std::pair<const WeightSource*, std::string> tensors[] = {{&source, "q_proj.weight"},
                                                                 {&fresh, "x.lora_A.weight"}};
  for (const auto& [from, name] : tensors) {
    const auto whole = read(*from, name, 0, 2049);
    for (int64_t cut : {1, 3, 257, 2048}) {
      auto parts = read(*from, name, 0, cut);
      const auto rest = read(*from, name, cut, 2049);
      parts.insert(parts.end(), rest.begin(), rest.end());
      EXPECT_EQ(parts, whole);
    }
  }
}

TEST(RandomWeights, DependOnSeedAndName) {
  const auto weights = read(RandomWeights(1), "a.weight", 0, 64);
  EXPECT_EQ(read(RandomWeights(1), "a.weight", 0, 64), weights);
  EXPECT_NE(read(RandomWeights(2), "a.weight", 0, 64), weights);
  EXPECT_NE(read(RandomWeights(1), "b.weight", 0, 64), weights);
}

TEST(RandomWeights, MatricesAreNormalWithDeviationTwoPercent) {
  constexpr int64_t kSize = 200000;
  const auto weights = read(RandomWeights(3), "model.embed_tokens.weight", 0, kSize);
  double mean = 0, square = 0, neighbours = 0;
  int64_t beyond_one = 0, beyond_two = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const double z = weights[i] / 0.02;
    mean += z, square += z * z;
    if (i > 0) neighbours += z * weights[i - 1] / 0.02;
    beyond_one += std::abs(z) > 1, beyond_two += std::abs(z) > 2;
  }
  const auto n = static_cast<double>(kSize);
  // Standard errors: 1/√n = 0.0022, √(2/n) = 0.0032, √(p(1-p)/n) < 0.0011; four of each pass.
  EXPECT_NEAR(mean / n, 0, 0.009);
  EXPECT_NEAR(square / n, 1, 0.013);
  EXPECT_NEAR(neighbours / n, 0, 0.009);
  EXPECT_NEAR(static_cast<double>(beyond_one) / n, 0.3173, 0.0044);
  EXPECT_NEAR(static_cast<double>(beyond_two) / n, 0.0455, 0.0019);
}

TEST(RandomWeights, NormsAreOneAndBiasesZero) {
  const RandomWeights source(1);
  for (const char* name : {"model.norm.weight", "model.layers.0.input_layernorm.weight",
                           "model.layers.0.self_attn.q_norm.weight"}) {
    EXPECT_EQ(read(source, name, 2, 5), (std::vector<float>{1, 1, 1})) << name;
  }
  EXPECT_EQ(read(source, "model.layers.0.self_attn.q_proj.bias", 2, 5),
            (std::vector<float>{0, 0, 0}));
}

TEST(FreshAdapters, StartWithUniformAAndZeroBOverTheirBase) {
  const FreshAdapters fresh = adapters(1);
  EXPECT_EQ(read(fresh, "x.lora_B.weight", 3, 6), (std::vector<float>{0, 0, 0}));
  EXPECT_EQ(read(fresh, "x.weight", 3, 6), (std::vector<float>{3, 4, 5}));

  constexpr int64_t kSize = 50000;
  const auto a = read(fresh, "x.lora_A.weight", 0, kSize);
  const auto [low, high] = std::minmax_element(a.begin(), a.end());
  const double bound = 1.0 / 8;  // 1 / √64
  EXPECT_GE(*low, -bound);
  EXPECT_LE(*high, bound);
  EXPECT_LT(*low, -0.999 * bound);  // 50,000 draws reach both ends
  EXPECT_GT(*high, 0.999 * bound);
  double mean = 0, square = 0;
  for (float v : a) mean += v, square += v * v;
  // Uniform: variance bound²/3; standard errors bound/√(3n) and 0.9 · bound²/3/√n; four pass.
  EXPECT_NEAR(mean / kSize, 0, 4 * bound / std::sqrt(3.0 * kSize));
  EXPECT_NEAR(square / kSize, bound * bound / 3, 4 * bound * bound / 3 / std::sqrt(1.0 * kSize));
  EXPECT_NE(read(adapters(2), "x.lora_A.weight", 0, 64), read(fresh, "x.lora_A.weight", 0, 64));
}

DecoderConfig config(int64_t head_dim, double theta) {
  DecoderConfig c;
  c.head_dim = head_dim;
  c.rope_theta = theta;
  return c;
}

TEST(RotaryTables, HoldTheCosineAndSineOfEveryAngle) {
  const auto [cos, sin] = rotary_tables(config(64, 1e5), 2049);
  ASSERT_EQ(cos.sizes(), (at::IntArrayRef{2049, 32}));
  ASSERT_EQ(sin.sizes(), (at::IntArrayRef{2049, 32}));
  for (int64_t position : {0, 1, 2048}) {
    for (int64_t i : {0, 1, 17, 31}) {
      const auto p = static_cast<double>(position);
      const double angle = p * std::pow(1e5, -static_cast<double>(i) / 32);
      // Frequency and angle are floats: each right to 6e-8 of the angle.
      const double tolerance = 1e-7 + 1.3e-7 * angle;
      EXPECT_NEAR(cos[position][i].item<double>(), std::cos(angle), tolerance);
      EXPECT_NEAR(sin[position][i].item<double>(), std::sin(angle), tolerance);
    }
  }
}

TEST(RotaryTables, Llama3KeepsShortWavelengthsStretchesLongOnesAndBlendsBetween) {
  DecoderConfig scaled = config(128, 500000), plain = scaled;
  scaled.rope_scaling = {.factor = 8,
                         .low_freq_factor = 1,
                         .high_freq_factor = 4,
                         .original_max_position_embeddings = 8192};
  const at::Tensor with = rotary_tables(scaled, 2).second[1];
  const at::Tensor without = rotary_tables(plain, 2).second[1];
  int kept = 0, blended = 0, stretched = 0;
  for (int64_t i = 0; i < 64; ++i) {
    const double frequency = std::pow(500000.0, -static_cast<double>(i) / 64);
    const double turns = 8192 * frequency / (2 * std::numbers::pi);  // within the original context
    double expected = frequency;
    if (turns > 4) {
      ++kept;
      EXPECT_EQ(with[i].item<float>(), without[i].item<float>());
    } else if (turns < 1) {
      ++stretched;
      expected /= 8;
    } else {
      ++blended;
      const double share = (turns - 1) / 3;
      expected = frequency * (share + (1 - share) / 8);
    }
    EXPECT_NEAR(with[i].item<double>(), std::sin(expected), 2e-7 * expected) << i;
  }
  EXPECT_GT(kept, 10);
  EXPECT_GT(blended, 3);
  EXPECT_GT(stretched, 10);
}

}  // namespace
}  // namespace safegrad::models
