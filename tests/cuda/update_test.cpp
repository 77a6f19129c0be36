// Inner products and AdamW of src/cuda against plain fp64.
#include <gtest/gtest.h>

#include "core/error.h"
#include "cuda/any_order.h"
#include "cuda/sparse_memory.h"

namespace safegrad::test {
namespace {

// Around the chunks of the source (2048, 16384) and away from them.
const int64_t kSizes[] = {1, 3, 257, 2049, 16384, 16385, 200003};

TEST(CudaInnerProducts, MatchAPlainFp64SumAndAddToWhatIsThere) {
  for (int64_t n : kSizes) {
    std::vector<at::Tensor> all;
    for (uint64_t k = 0; k < 4; ++k) {
      all.push_back(random_tensor({n}, k) * std::pow(10.0, -static_cast<double>(k)));
    }
    for (int64_t count : {1, 2, 4}) {
      std::vector<at::Tensor> g(all.begin(), all.begin() + count);
      for (bool aligned : {true, false}) {
        if (!aligned) g.back() = misaligned(g.back());
        const auto got = in_any_order([&] {
          at::Tensor gram = at::full({count, count}, 100.0, at::kDouble);
          kernels().add_inner_products(g, gram);
          return std::vector<at::Tensor>{gram};
        });
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t j = 0; j < count; ++j) {
            const Values x = values_of(all[static_cast<size_t>(i)]);
            const Values y = values_of(all[static_cast<size_t>(j)]);
            const double scale = std::sqrt(dot(x, x) * dot(y, y));
            // Products of two floats are exact in fp64; only sums of 2e5 terms round, and the 100.
            EXPECT_NEAR(got[0][i][j].item<double>() - 100, dot(x, y), 1e-12 * scale + 1e-13)
                << n << ": " << i << ", " << j;
          }
        }
        EXPECT_TRUE(same_bits(got[0], got[0].t()));
      }
    }
  }
}

TEST(CudaInnerProducts, OfAnEmptyShardAddNothingAndTooManyAreRefused) {
  at::Tensor gram = at::full({1, 1}, 7.0, at::kDouble);
  kernels().add_inner_products({at::empty({0})}, gram);
  EXPECT_EQ(gram.item<double>(), 7);
  const at::Tensor g = at::ones({3});
  EXPECT_THROW(kernels().add_inner_products({g, g, g, g, g}, at::zeros({5, 5}, at::kDouble)),
               UsageError);
  EXPECT_THROW(kernels().add_inner_products({g.to(at::kDouble)}, gram), UsageError);
}

// torch.optim.AdamW, in fp64.
struct Reference {
  double lr = 1e-2, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
  at::Tensor p, m, v;
  int step = 0;

  AdamW element() const {
    AdamW a;
    a.beta2 = static_cast<float>(beta2);
    a.eps = static_cast<float>(eps);
    a.rest1 = static_cast<float>(1 - beta1);
    a.rest2 = static_cast<float>(1 - beta2);
    a.step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
    a.inverse_sqrt_bc2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
    a.decay = static_cast<float>(1 - lr * weight_decay);
    return a;
  }
  void update(const at::Tensor& g, int64_t begin, int64_t end, bool decays) {
    const int64_t n = end - begin;
    at::Tensor gk = g.narrow(0, begin, n), pk = p.narrow(0, begin, n);
    at::Tensor mk = m.narrow(0, begin, n), vk = v.narrow(0, begin, n);
    if (decays) pk.mul_(1 - lr * weight_decay);
    mk.mul_(beta1).add_(gk, 1 - beta1);
    vk.mul_(beta2).add_(gk * gk, 1 - beta2);
    const at::Tensor m_hat = mk / (1 - std::pow(beta1, step));
    const at::Tensor v_hat = vk / (1 - std::pow(beta2, step));
    pk.sub_(lr * m_hat / (v_hat.sqrt() + eps));
  }
};

struct Case {
  int64_t size;
  size_t gradients;
  std::vector<UpdateRange> ranges;
};

std::vector<Case> cases() {
  std::vector<Case> result = {
      {1, 1, {{0, 1, true}}},
      {257, 2, {{0, 257, false}}},
      // Gaps, an empty range, ends inside and at the ends of packs and chunks.
      {9001, 2, {{0, 5, true}, {5, 8, false}, {8, 8, true}, {10, 4097, true}, {6001, 9001, false}}},
      {200003, 1, {{1, 200002, true}}}};
  Case many{1000, 2, {}};  // more than travel with one launch
  for (int64_t i = 0; i < 100; ++i) many.ranges.push_back({10 * i, 10 * i + 9, i % 3 == 0});
  result.push_back(many);
  return result;
}

// Three steps of `c`; every element outside the ranges must keep its bits.
void check_steps(const Case& c, at::ScalarType compute_type, bool aligned) {
  const std::vector<double> coefficients = {0.75, -1.5};
  Reference reference;
  const at::Tensor start = random_tensor({c.size}, 1);
  reference.p = start.to(at::kDouble);
  reference.m = at::zeros({c.size}, at::kDouble);
  reference.v = at::zeros({c.size}, at::kDouble);
  std::vector<std::vector<at::Tensor>> gradients;
  for (uint64_t step = 0; step < 3; ++step) {
    gradients.emplace_back();
    for (size_t k = 0; k < c.gradients; ++k) {
      at::Tensor g = random_tensor({c.size}, 10 * step + k);
      gradients.back().push_back(aligned ? g : misaligned(g));
    }
  }
  const auto steps = in_any_order([&] {
    const auto held = [&](const at::Tensor& t) { return aligned ? t.clone() : misaligned(t); };
    ShardState shard{held(start), held(at::zeros({c.size})), held(at::zeros({c.size})), {}};
    shard.compute = compute_type == at::kFloat ? shard.master : shard.master.to(compute_type);
    Reference schedule;
    for (const auto& g : gradients) {
      ++schedule.step;
      kernels().update(g, {coefficients.begin(), coefficients.begin() + c.gradients},
                       schedule.element(), c.ranges, shard);
    }
    return std::vector<at::Tensor>{shard.master, shard.m, shard.v, shard.compute};
  });
  at::Tensor outside = at::ones({c.size}, at::kBool);
  for (const auto& g : gradients) {
    at::Tensor sum = at::zeros({c.size}, at::kDouble);
    for (size_t k = 0; k < g.size(); ++k) sum.add_(g[k].to(at::kDouble), coefficients[k]);
    ++reference.step;
    for (const UpdateRange& r : c.ranges) {
      reference.update(sum, r.begin, r.end, r.decays);
      outside.narrow(0, r.begin, r.end - r.begin).fill_(false);
    }
  }

  // Three steps of 1e-2 in float: a step is right to 1e-6 of itself, a sum to 6e-8 of values of 4;
  // where a gradient nearly cancels, v is tiny and the step loses digits with it.
  expect_within(steps[0], reference.p, 0x1p-22, 1e-6);
  expect_within(steps[1], reference.m, 0, 1e-6);
  expect_within(steps[2], reference.v, 1e-5, 1e-7);
  EXPECT_TRUE(same_bits(steps[3], steps[0].to(compute_type)));
  EXPECT_TRUE(same_bits(steps[0].masked_select(outside), start.masked_select(outside)));
}

TEST(CudaUpdate, MatchesAdamWInFp64OnEveryRange) {
  for (const Case& c : cases()) {
    for (at::ScalarType compute : kTypes) {
      check_steps(c, compute, true);
      check_steps(c, compute, false);
    }
  }
}

TEST(CudaUpdate, OfAllRangesIsOneLaunch) {
  const at::Tensor g = at::ones({9001});
  const ShardState shard{at::ones({9001}), at::zeros({9001}), at::zeros({9001}),
                         at::zeros({9001}, at::kBFloat16)};
  Reference schedule;
  schedule.step = 1;
  const int64_t before = emulation::launches();
  kernels().update({g}, {1.0}, schedule.element(), cases()[2].ranges, shard);
  EXPECT_EQ(emulation::launches() - before, 1);
  EXPECT_EQ(shard.compute[8].item<float>(), 0) << "8 is in no range";
  EXPECT_NE(shard.compute[11].item<float>(), 0);
}

TEST(CudaUpdate, ReachesElementsBeyondThe2To31st) {
  const int64_t size = (int64_t{1} << 31) + 4096, begin = size - 301, n = 300;
  const SparseMemory g_memory(4 * size), p_memory(4 * size), m_memory(4 * size), v_memory(4 * size);
  for (const SparseMemory* memory : {&g_memory, &p_memory, &m_memory, &v_memory}) {
    if (!memory->mapped()) GTEST_SKIP() << "the system does not promise 8 GiB";
  }
  const auto whole = [&](const SparseMemory& memory) {
    return memory.tensor({size}, {1}, at::kFloat);
  };
  const at::Tensor g = random_tensor({n}, 3), start = random_tensor({n}, 4);
  whole(g_memory).narrow(0, begin, n).copy_(g);
  whole(p_memory).narrow(0, begin, n).copy_(start);
  const at::Tensor master = whole(p_memory), small = start.clone();
  Reference schedule;
  schedule.step = 1;

  kernels().update({whole(g_memory)}, {1.0}, schedule.element(), {{begin, begin + n, true}},
                   {master, whole(m_memory), whole(v_memory), master});
  kernels().update({g}, {1.0}, schedule.element(), {{0, n, true}},
                   {small, at::zeros({n}), at::zeros({n}), small});

  EXPECT_TRUE(same_bits(master.narrow(0, begin, n), small));
  EXPECT_FALSE(same_bits(small, start));
}

TEST(CudaUpdate, WritesACopyInFloatToo) {
  const at::Tensor g = at::ones({100});
  const ShardState shard{at::ones({100}), at::zeros({100}), at::zeros({100}), at::zeros({100})};
  Reference schedule;
  schedule.step = 1;
  kernels().update({g}, {1.0}, schedule.element(), {{0, 100, true}}, shard);
  EXPECT_TRUE(same_bits(shard.compute, shard.master));
  EXPECT_NE(shard.master[0].item<float>(), 1);
}

TEST(CudaUpdate, RefusesARangeOutsideTheShardAndGradientsOfAnotherSize) {
  const ShardState shard{at::ones({10}), at::zeros({10}), at::zeros({10}), at::ones({10})};
  Reference schedule;
  schedule.step = 1;
  const AdamW adamw = schedule.element();
  EXPECT_THROW(kernels().update({at::ones({10})}, {1.0}, adamw, {{0, 11, true}}, shard),
               UsageError);
  EXPECT_THROW(kernels().update({at::ones({9})}, {1.0}, adamw, {{0, 10, true}}, shard), UsageError);
  EXPECT_THROW(kernels().update({at::ones({10})}, {}, adamw, {{0, 10, true}}, shard), UsageError);
}

}  // namespace
}  // namespace safegrad::test
