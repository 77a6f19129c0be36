#include <gtest/gtest.h>

#include "unit/kernels.h"
#include "unit/numbers.h"

namespace safegrad::models {
namespace {

using test::attention;
using test::attention_backward;
using test::central_differences;
using test::dot;
using test::expect_close;
using test::expect_equal;
using test::random_tensor;
using test::Values;
using test::values_of;

PackedBatch batch_of(const std::vector<int64_t>& lengths) {
  PackedBatch batch;
  batch.cu_seqlens = {0};
  for (int64_t length : lengths) batch.cu_seqlens.push_back(batch.size() + length);
  batch.segments = {0, batch.size()};
  return batch;
}

// Causal grouped-query attention by its definition.
Values exact(const Values& qkv, const AttentionShape& s, const std::vector<int64_t>& cu_seqlens) {
  const auto d = static_cast<size_t>(s.head_dim), heads = static_cast<size_t>(s.heads);
  const auto kv = static_cast<size_t>(s.kv_heads), width = (heads + 2 * kv) * d;
  Values out(qkv.size() / width * heads * d, 0.0);
  for (size_t n = 0; n + 1 < cu_seqlens.size(); ++n) {
    const auto begin = static_cast<size_t>(cu_seqlens[n]),
               end = static_cast<size_t>(cu_seqlens[n + 1]);
    for (size_t h = 0; h < heads; ++h) {
      const size_t k_at = (heads + h / (heads / kv)) * d, v_at = k_at + kv * d;
      for (size_t t = begin; t < end; ++t) {
        Values weight;
        double sum = 0;
        for (size_t past = begin; past <= t; ++past) {
          double score = 0;
          for (size_t i = 0; i < d; ++i)
            score += qkv[t * width + h * d + i] * qkv[past * width + k_at + i];
          weight.push_back(std::exp(score / std::sqrt(static_cast<double>(d))));
          sum += weight.back();
        }
        for (size_t past = begin; past <= t; ++past) {
          for (size_t i = 0; i < d; ++i) {
            out[(t * heads + h) * d + i] +=
                weight[past - begin] / sum * qkv[past * width + v_at + i];
          }
        }
      }
    }
  }
  return out;
}

const AttentionShape kShapes[] = {{4, 2, 8}, {3, 1, 16}, {2, 2, 64}, {9, 3, 8}};

int64_t width_of(const AttentionShape& s) {
  return (s.heads + 2 * s.kv_heads) * s.head_dim;
}

TEST(Attention, MatchesTheDefinitionForGroupedHeadsAndUnevenSequences) {
  for (const AttentionShape& shape : kShapes) {
    for (const std::vector<int64_t>& lengths :
         {std::vector<int64_t>{1}, {3}, {1, 5, 2}, {257}, {64, 1, 33}}) {
      const PackedBatch batch = batch_of(lengths);
      const at::Tensor qkv = random_tensor({batch.size(), width_of(shape)}, 1);
      std::vector<at::Tensor> lse;
      const at::Tensor out = attention(qkv, shape, batch, lse);
      // Float softmax over at most 257 keys and a weighted mean of values of size 1.
      expect_close(out, exact(values_of(qkv), shape, batch.cu_seqlens), 3e-6);
      EXPECT_EQ(lse.size(), lengths.size());
    }
  }
}

TEST(Attention, PackedSequencesNeverAttendToEachOther) {
  const AttentionShape shape{4, 2, 8};
  const PackedBatch batch = batch_of({5, 40, 3});
  const at::Tensor qkv = random_tensor({48, width_of(shape)}, 2);
  at::Tensor changed = qkv.clone();
  changed.narrow(0, 5, 40).mul_(-100);
  std::vector<at::Tensor> lse;
  const at::Tensor out = attention(qkv, shape, batch, lse);

  const at::Tensor other = attention(changed, shape, batch, lse);

  expect_equal(other.narrow(0, 0, 5), out.narrow(0, 0, 5));
  expect_equal(other.narrow(0, 45, 3), out.narrow(0, 45, 3));
  EXPECT_FALSE(at::equal(other.narrow(0, 5, 40), out.narrow(0, 5, 40)));
  expect_equal(attention(qkv.narrow(0, 5, 40), shape, batch_of({40}), lse), out.narrow(0, 5, 40));
}

TEST(Attention, ATokenSeesNothingThatFollows) {
  const AttentionShape shape{4, 2, 8};
  const at::Tensor qkv = random_tensor({20, width_of(shape)}, 3);
  at::Tensor changed = qkv.clone();
  changed.narrow(0, 13, 7).mul_(-10);
  std::vector<at::Tensor> lse;
  const at::Tensor out = attention(qkv, shape, batch_of({20}), lse);
  const at::Tensor other = attention(changed, shape, batch_of({20}), lse);
  expect_equal(other.narrow(0, 0, 13), out.narrow(0, 0, 13));
}

TEST(Attention, AContinuationEqualsTheFullSequence) {
  for (const AttentionShape& shape : kShapes) {
    const int64_t prompt = 7, first = 4, second = 1;
    const at::Tensor qkv = random_tensor({prompt + first + second, width_of(shape)}, 4);
    PackedBatch shared = batch_of({prompt, first, second});
    shared.parents = {-1, 0, 0};
    std::vector<at::Tensor> lse;
    const at::Tensor out = attention(qkv, shape, shared, lse);

    const at::Tensor whole =
        attention(qkv.narrow(0, 0, prompt + first), shape, batch_of({prompt + first}), lse);
    const at::Tensor other =
        attention(at::cat({qkv.narrow(0, 0, prompt), qkv.narrow(0, prompt + first, second)}), shape,
                  batch_of({prompt + second}), lse);

    // Two kernels, both right to a few float roundings.
    expect_close(out.narrow(0, 0, prompt + first), values_of(whole), 2e-6);
    expect_close(out.narrow(0, prompt + first, second), values_of(other.narrow(0, prompt, second)),
                 2e-6);
  }
}

TEST(Attention, LargeScoresDoNotOverflow) {
  const AttentionShape shape{2, 1, 8};
  const at::Tensor qkv = random_tensor({6, width_of(shape)}, 5) * 60;
  PackedBatch shared = batch_of({4, 2});
  shared.parents = {-1, 0};
  std::vector<at::Tensor> lse;
  EXPECT_TRUE(attention(qkv, shape, batch_of({6}), lse).isfinite().all().item<bool>());
  EXPECT_TRUE(attention(qkv, shape, shared, lse).isfinite().all().item<bool>());
}

TEST(Attention, NoTokensGiveNoRows) {
  const AttentionShape shape{4, 2, 8};
  std::vector<at::Tensor> lse;
  const at::Tensor qkv = at::empty({0, width_of(shape)});
  const at::Tensor out = attention(qkv, shape, batch_of({}), lse);
  EXPECT_EQ(out.sizes(), (at::IntArrayRef{0, 32}));
  EXPECT_EQ(attention_backward(out, qkv, out, lse, shape, batch_of({})).size(0), 0);
}

TEST(AttentionBackward, MatchesFiniteDifferencesInEveryElement) {
  for (const AttentionShape& shape : {AttentionShape{4, 2, 4}, {3, 1, 4}, {2, 2, 6}}) {
    const PackedBatch batch = batch_of({4, 1, 3});
    const at::Tensor qkv = random_tensor({8, width_of(shape)}, 6);
    const at::Tensor dout = random_tensor({8, shape.heads * shape.head_dim}, 7);
    std::vector<at::Tensor> lse;
    const at::Tensor out = attention(qkv, shape, batch, lse);

    const at::Tensor dqkv = attention_backward(dout, qkv, out, lse, shape, batch);

    const Values dy = values_of(dout);
    const Values expected = central_differences(
        [&](const Values& x) { return dot(dy, exact(x, shape, batch.cu_seqlens)); },
        values_of(qkv));
    expect_close(dqkv, expected, 5e-6);  // float sums of up to 4 · 4 · 4 products of size 1
  }
}

// Long enough for several blocks of the kernel: the derivative along random directions.
TEST(AttentionBackward, MatchesDirectionalDerivativesOfLongSequences) {
  const AttentionShape shape{4, 2, 16};
  const PackedBatch batch = batch_of({257, 40, 129});
  const at::Tensor qkv = random_tensor({426, width_of(shape)}, 8);
  const at::Tensor dout = random_tensor({426, shape.heads * shape.head_dim}, 9);
  std::vector<at::Tensor> lse;
  const at::Tensor out = attention(qkv, shape, batch, lse);

  const Values gradient = values_of(attention_backward(dout, qkv, out, lse, shape, batch));

  const Values x = values_of(qkv), dy = values_of(dout);
  for (uint64_t seed : {10, 11}) {
    const Values direction = values_of(random_tensor(qkv.sizes(), seed));
    auto moved = [&](double step) {
      Values y = x;
      for (size_t i = 0; i < y.size(); ++i) y[i] += step * direction[i];
      return dot(dy, exact(y, shape, batch.cu_seqlens));
    };
    const double expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
    // 55k elements right to 1e-6 each, summed with random signs: 2e-4; truncation is below.
    EXPECT_NEAR(dot(gradient, direction), expected, 2e-3);
    EXPECT_GT(std::abs(expected), 1) << "the check would prove nothing";
  }
}

}  // namespace
}  // namespace safegrad::models
