#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "unit/kernels.h"
#include "unit/numbers.h"

namespace safegrad {
namespace {

using test::add_inner_products;
using test::dot;
using test::expect_equal;
using test::random_tensor;
using test::Values;
using test::values_of;

// Around the blocks of the sources (2048, 16384, 65536) and away from them.
const int64_t kSizes[] = {1, 3, 257, 2049, 16385, 65536, 200003};

TEST(InnerProducts, MatchAPlainFp64Sum) {
  for (int64_t n : kSizes) {
    const std::vector<at::Tensor> g = {random_tensor({n}, 1), random_tensor({n}, 2) * 1e-3};
    Gram gram(2);
    add_inner_products(g, gram);
    for (size_t i = 0; i < 2; ++i) {
      for (size_t j = 0; j < 2; ++j) {
        const Values x = values_of(g[i]), y = values_of(g[j]);
        const double scale = std::sqrt(dot(x, x) * dot(y, y));
        // Products of two floats are exact in fp64; only sums of 2e5 terms round.
        EXPECT_NEAR(gram.at(i, j), dot(x, y), 1e-12 * scale) << n << ": " << i << ", " << j;
      }
    }
  }
}

TEST(InnerProducts, AddToWhatIsThereAndTakeOneOrThreeGradients) {
  const at::Tensor x = at::tensor({1.0f, 2.0f}), y = at::tensor({3.0f, -1.0f});
  Gram one(1), three(3);
  one.at(0, 0) = 100;
  add_inner_products({x}, one);
  add_inner_products({x, y, x}, three);
  EXPECT_EQ(one.at(0, 0), 105);
  EXPECT_EQ(three.values, (Values{5, 1, 5, 1, 10, 1, 5, 1, 5}));
  add_inner_products({at::empty({0})}, one);  // a rank whose shard is empty
  EXPECT_EQ(one.at(0, 0), 105);
}

TEST(InnerProducts, KeepWhatAFloatSumWouldLose) {
  at::Tensor g = at::full({1 << 17}, 1e-4f);
  g[0] = 1e2f;
  Gram gram(1);
  add_inner_products({g}, gram);
  const double small = static_cast<double>(1e-4f) * static_cast<double>(1e-4f);
  EXPECT_NEAR(gram.at(0, 0), 1e4 + 131071 * small, 1e-7);  // fp64 at 1e4: steps of 1.8e-12
}

TEST(InnerProducts, AreTheSameBitsWithAnyNumberOfThreads) {
  const std::vector<at::Tensor> g = {random_tensor({200003}, 3), random_tensor({200003}, 4)};
  const int before = at::get_num_threads();
  std::vector<Values> results;
  for (int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    Gram gram(2);
    add_inner_products(g, gram);
    results.push_back(gram.values);
  }
  at::set_num_threads(before);
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

TEST(InnerProducts, NotANumberReachesTheGramMatrix) {
  at::Tensor g = random_tensor({257}, 5);
  g[200] = std::numeric_limits<float>::quiet_NaN();
  Gram gram(2);
  add_inner_products({random_tensor({257}, 6), g}, gram);
  EXPECT_FALSE(gram.finite());
}

struct Hyper {
  double lr = 1e-2, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.1;

  AdamW at_step(int t) const {
    AdamW adamw;
    adamw.rest1 = static_cast<float>(1 - beta1);
    adamw.rest2 = static_cast<float>(1 - beta2);
    adamw.beta2 = static_cast<float>(beta2);
    adamw.eps = static_cast<float>(eps);
    adamw.step_size = static_cast<float>(lr / (1 - std::pow(beta1, t)));
    adamw.inverse_sqrt_bc2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t)));
    adamw.decay = static_cast<float>(1 - lr * weight_decay);
    return adamw;
  }
};

struct State {
  at::Tensor p, m, v;

  explicit State(int64_t n) : p(random_tensor({n}, 30)), m(at::zeros({n})), v(at::zeros({n})) {}
};

// arXiv:1711.05101, algorithm 2, with u and a combined first.
struct ExactState {
  Values p, m, v;

  explicit ExactState(const State& s) : p(values_of(s.p)), m(values_of(s.m)), v(values_of(s.v)) {}

  void step(const Values& u, const Values& a, const std::vector<double>& c, const Hyper& h, int t) {
    for (size_t i = 0; i < p.size(); ++i) {
      const double g = c[0] * u[i] + c[1] * a[i];
      m[i] = h.beta1 * m[i] + (1 - h.beta1) * g;
      v[i] = h.beta2 * v[i] + (1 - h.beta2) * g * g;
      const double m_hat = m[i] / (1 - std::pow(h.beta1, t));
      const double v_hat = v[i] / (1 - std::pow(h.beta2, t));
      p[i] -= h.lr * h.weight_decay * p[i] + h.lr * m_hat / (std::sqrt(v_hat) + h.eps);
    }
  }
};

void fused_update(const std::vector<at::Tensor>& g, const std::vector<double>& c,
                  const AdamW& adamw, int64_t begin, int64_t end, const State& s) {
  cpu_kernels().update(g, c, adamw, {{begin, end, true}}, {s.p, s.m, s.v, s.p});
}

constexpr int kSteps = 5;

// A step moves an element by about lr. Five steps: roundings of |p| < 5 to 2.4e-7 each, and of the
// step itself to a few of 6e-8.
constexpr double kMoved = kSteps * (2.4e-7 + 1e-2 * 1e-6);

TEST(FusedUpdate, FollowsTheFormulaInFp64) {
  const Hyper hyper;
  for (int64_t n : kSizes) {
    State state(n);
    ExactState exact(state);
    const Values start = exact.p;
    for (int t = 1; t <= kSteps; ++t) {
      const auto seed = static_cast<uint64_t>(40 + 2 * t);
      const std::vector<at::Tensor> g = {random_tensor({n}, seed), random_tensor({n}, seed + 1)};
      const std::vector<double> c = {0.7, 0.1 * t};
      fused_update(g, c, hyper.at_step(t), 0, n, state);
      exact.step(values_of(g[0]), values_of(g[1]), c, hyper, t);
    }
    test::expect_close(state.p, exact.p, kMoved);
    test::expect_close(state.m, exact.m, 1e-6);
    test::expect_close(state.v, exact.v, 1e-6);
    EXPECT_GT(std::abs(exact.p[0] - start[0]), 100 * kMoved) << "nothing moved";
  }
}

TEST(FusedUpdate, FollowsTorchsOwnOperators) {
  const Hyper h;
  constexpr int64_t kSize = 2049;
  State ours(kSize), torch(kSize);
  for (int t = 1; t <= kSteps; ++t) {
    const at::Tensor u = random_tensor({kSize}, static_cast<uint64_t>(60 + t));
    fused_update({u}, {1.0}, h.at_step(t), 0, kSize, ours);

    torch.p.mul_(1 - h.lr * h.weight_decay);
    torch.m.lerp_(u, 1 - h.beta1);
    torch.v.mul_(h.beta2).addcmul_(u, u, 1 - h.beta2);
    const at::Tensor root = torch.v.sqrt().div_(std::sqrt(1 - std::pow(h.beta2, t))).add_(h.eps);
    torch.p.addcdiv_(torch.m, root, -h.lr / (1 - std::pow(h.beta1, t)));
  }
  test::expect_close(ours.p, values_of(torch.p), kMoved);
}

TEST(FusedUpdate, EpsilonStandsOutsideTheRoot) {
  Hyper h;
  h.eps = 1e-2;
  h.weight_decay = 0;
  State state(1);
  const double start = values_of(state.p)[0];
  const at::Tensor g = at::full({1}, 1e-2f);
  fused_update({g}, {1.0}, h.at_step(1), 0, 1, state);
  // First step: m̂ = g, √v̂ = g, so half of lr; inside the root it would be a tenth of it.
  EXPECT_NEAR(values_of(state.p)[0], start - 0.5 * h.lr, 2 * kMoved / kSteps);
}

TEST(FusedUpdate, TouchesItsRangeAloneAndPiecesGiveTheSameBits) {
  constexpr int64_t kSize = 40000;
  const std::vector<at::Tensor> g = {random_tensor({kSize}, 70), random_tensor({kSize}, 71)};
  const std::vector<double> c = {1.0, -0.3};
  const AdamW adamw = Hyper().at_step(3);
  State whole(kSize), pieces(kSize);
  const at::Tensor start = pieces.p.clone();
  fused_update(g, c, adamw, 0, kSize, whole);

  fused_update(g, c, adamw, 777, 20001, pieces);
  expect_equal(pieces.p.narrow(0, 0, 777), start.narrow(0, 0, 777));
  expect_equal(pieces.p.narrow(0, 20001, 19999), start.narrow(0, 20001, 19999));
  EXPECT_EQ(pieces.v.narrow(0, 20001, 19999).abs().max().item<float>(), 0);
  fused_update(g, c, adamw, 0, 777, pieces);
  fused_update(g, c, adamw, 20001, kSize, pieces);
  fused_update(g, c, adamw, 5, 5, pieces);  // an empty range

  expect_equal(pieces.p, whole.p);
  expect_equal(pieces.m, whole.m);
  expect_equal(pieces.v, whole.v);
}

TEST(FusedUpdate, IsTheSameBitsWithAnyNumberOfThreads) {
  constexpr int64_t kSize = 200003;
  const std::vector<at::Tensor> g = {random_tensor({kSize}, 72), random_tensor({kSize}, 73)};
  const int before = at::get_num_threads();
  std::vector<at::Tensor> results;
  for (int threads : {1, 3}) {
    at::set_num_threads(threads);
    State state(kSize);
    fused_update(g, {0.5, 2.0}, Hyper().at_step(2), 0, kSize, state);
    results.push_back(state.p);
  }
  at::set_num_threads(before);
  expect_equal(results[0], results[1]);
}

TEST(FusedUpdate, DecaysWhereARangeSaysSoAndLeavesGapsAlone) {
  constexpr int64_t kSize = 5000;
  const at::Tensor no_gradient = at::zeros({kSize});
  const AdamW adamw = Hyper().at_step(1);
  const State state(kSize);
  const at::Tensor start = state.p.clone();
  cpu_kernels().update({no_gradient}, {1.0}, adamw,
                       {{0, 100, true}, {100, 3000, false}, {3500, kSize, true}},
                       {state.p, state.m, state.v, state.p});
  const at::Tensor decayed = start * adamw.decay;
  EXPECT_FALSE(at::equal(decayed, start));
  expect_equal(state.p.narrow(0, 0, 100), decayed.narrow(0, 0, 100));
  expect_equal(state.p.narrow(0, 100, 3400), start.narrow(0, 100, 3400));
  expect_equal(state.p.narrow(0, 3500, 1500), decayed.narrow(0, 3500, 1500));
}

TEST(FusedUpdate, TheComputeCopyFollowsTheMaster) {
  const State state(2049);
  const at::Tensor compute = at::zeros({2049}, at::kBFloat16);
  cpu_kernels().update({random_tensor({2049}, 74)}, {1.0}, Hyper().at_step(1), {{0, 2049, true}},
                       {state.p, state.m, state.v, compute});
  expect_equal(compute, state.p.to(at::kBFloat16));
  compute.fill_(7);  // of two sweeps with different coefficients, each writes its own ranges
  cpu_kernels().update({random_tensor({2049}, 75)}, {0.5}, Hyper().at_step(2), {{5, 1000, true}},
                       {state.p, state.m, state.v, compute});
  expect_equal(compute.narrow(0, 5, 995), state.p.narrow(0, 5, 995).to(at::kBFloat16));
  EXPECT_EQ(compute[4].item<float>(), 7);
  EXPECT_EQ(compute[1000].item<float>(), 7);
}

}  // namespace
}  // namespace safegrad
