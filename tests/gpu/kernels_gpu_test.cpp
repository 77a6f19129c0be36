// kernels_gpu_test.cpp: every kernel on the GPU against the CPU's, and against itself.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "cpu/cpu_kernels.h"
#include "dist/rank_main.h"
#include "unit/numbers.h"

namespace safegrad::testing {
namespace {

using test::expect_equal;
using test::indices;
using test::random_tensor;

// Relative to the largest value. float32: the same arithmetic in another order. bfloat16: results
// are rounded to 8 bits, and sums of rounded values add a few such errors.
double tolerance(at::ScalarType dtype) {
  return dtype == at::kFloat ? 2e-5 : 2e-2;
}

class GpuKernels : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  at::ScalarType dtype() const { return GetParam(); }
  const Kernels& gpu() const { return backend().kernels(); }
  at::Tensor random(at::IntArrayRef shape, uint64_t seed) const {
    return random_tensor(shape, seed).to(dtype());
  }
  at::Tensor there(const at::Tensor& host) const { return host.to(backend().device()); }

  void expect_near(const at::Tensor& on_gpu, const at::Tensor& on_cpu) const {
    const at::Tensor a = on_gpu.to(at::kCPU, at::kDouble), b = on_cpu.to(at::kDouble);
    ASSERT_EQ(a.sizes(), b.sizes());
    if (a.numel() == 0) return;
    const double largest = b.abs().max().item<double>();
    ASSERT_GT(largest, 0) << "nothing to compare";
    EXPECT_LE((a - b).abs().max().item<double>(), tolerance(dtype()) * largest);
  }
};

Parameter vector_parameter(const at::Tensor& value) {
  Parameter p;
  p.shape = {value.numel()};
  p.value = value;
  for (int k = 0; k < 2; ++k) {
    p.grads.push_back(at::zeros_like(value));
    p.fresh.push_back(true);
  }
  return p;
}

TEST_P(GpuKernels, RmsNormForwardAndBackward) {
  for (int64_t width : {64, 576, 1000, 4096}) {
    const int64_t rows = 301;
    const std::vector<int64_t> segments = {0, 200, rows};
    const at::Tensor x = random({rows, width}, 1), w = random({width}, 2),
                     dy = random({rows, width}, 3), dx = random({rows, width}, 4);
    Parameter host = vector_parameter(w), device = vector_parameter(there(w));
    at::Tensor host_rstd, device_rstd, host_dx = dx.clone(), device_dx = there(dx);
    expect_near(gpu().rms_norm(there(x), device.value, 1e-5, device_rstd),
                cpu_kernels().rms_norm(x, w, 1e-5, host_rstd));
    cpu_kernels().rms_norm_backward(dy, x, host_rstd, host, segments, host_dx);
    gpu().rms_norm_backward(there(dy), there(x), device_rstd, device, segments, device_dx);
    expect_near(device_dx, host_dx);
    for (size_t k = 0; k < 2; ++k) expect_near(device.grads[k], host.grads[k]);
  }
}

TEST_P(GpuKernels, RotateSwigluAndDropout) {
  const int64_t tokens = 77, heads = 5, d = 64, width = 1000;
  const at::Tensor positions = at::arange(tokens, at::kLong) % 30;
  const at::Tensor angle = random_tensor({30, d / 2}, 5), cos = angle.cos(), sin = angle.sin();
  at::Tensor host = random({tokens, heads, d}, 6), device = there(host);
  cpu_kernels().rotate(host, positions, cos, sin, false);
  gpu().rotate(device, there(positions), there(cos), there(sin), false);
  expect_near(device, host);

  const at::Tensor gate_up = random({tokens, 2 * width}, 7), dact = random({tokens, width}, 8);
  at::Tensor host_d, host_act, device_d, device_act;
  cpu_kernels().swiglu_backward(dact, gate_up, host_d, host_act);
  gpu().swiglu_backward(there(dact), there(gate_up), device_d, device_act);
  expect_near(device_d, host_d);
  expect_near(device_act, host_act);
  expect_near(gpu().swiglu(there(gate_up)), host_act);

  PackedBatch batch;
  batch.positions = positions;
  batch.dropout_keys = at::full({tokens}, 99, at::kLong);
  const at::Tensor expected = cpu_kernels().dropout(dact, batch, 0.3, 4);
  batch.positions = there(positions);
  batch.dropout_keys = there(batch.dropout_keys);
  expect_equal(gpu().dropout(there(dact), batch, 0.3, 4), expected);
}

PackedBatch batch_of(const std::vector<int64_t>& lengths) {
  PackedBatch batch;
  batch.cu_seqlens = {0};
  for (int64_t length : lengths) {
    batch.cu_seqlens.push_back(batch.size() + length);
    batch.longest = std::max(batch.longest, length);
  }
  batch.segments = {0, batch.size()};
  batch.tokens = at::zeros({batch.size()}, at::kLong).to(backend().device());
  batch.boundaries =
      at::tensor(at::ArrayRef<int64_t>(batch.cu_seqlens), at::kInt).to(backend().device());
  return batch;
}

TEST_P(GpuKernels, AttentionForwardAndBackward) {
  const AttentionShape shape{6, 2, 64};
  const PackedBatch batch = batch_of({1, 130, 37, 64, 3});
  const at::Tensor qkv = random({batch.size(), 10 * 64}, 9),
                   dout = random({batch.size(), 6 * 64}, 10);
  std::vector<at::Tensor> host_saved, device_saved;
  const at::Tensor host = cpu_kernels().attention(qkv, shape, batch, host_saved);
  const at::Tensor device = gpu().attention(there(qkv), shape, batch, device_saved);
  expect_near(device, host);
  const at::Tensor dqkv =
      gpu().attention_backward(there(dout), there(qkv), device, device_saved, shape, batch);
  expect_near(dqkv, cpu_kernels().attention_backward(dout, qkv, host, host_saved, shape, batch));
  const at::Tensor again =
      gpu().attention_backward(there(dout), there(qkv), device, device_saved, shape, batch);
  expect_equal(again, dqkv);
}

TEST_P(GpuKernels, AttentionOfASequenceThatContinuesAnother) {
  const AttentionShape shape{4, 2, 64};
  PackedBatch batch = batch_of({50, 7, 3, 20, 5});
  batch.parents = {-1, 0, 0, -1, 3};
  const at::Tensor qkv = random({batch.size(), 8 * 64}, 11);
  std::vector<at::Tensor> saved;
  const at::Tensor host = cpu_kernels().attention(qkv, shape, batch, saved);
  expect_near(gpu().attention(there(qkv), shape, batch, saved), host);
}

TEST_P(GpuKernels, LogitsAndTheirLosses) {
  const int64_t rows = 33, vocab = 50257, d = 128;
  const at::Tensor h = random({rows, d}, 12) * 0.3, h_ref = h + random({rows, d}, 13) * 0.05,
                   w = random({vocab, d}, 14);
  const at::Tensor targets = at::arange(rows, at::kLong) * 1500;
  auto losses = [&](const Kernels& kernels, auto move, at::Tensor& dce, at::Tensor& dkl) {
    dce = kernels.logits(move(h), move(w));
    dkl = kernels.logits(move(h), move(w));
    at::Tensor reference = kernels.logits(move(h_ref), move(w));
    at::Tensor loss = move(at::zeros({2}, at::kDouble));
    at::Tensor ce = loss.narrow(0, 0, 1), kl = loss.narrow(0, 1, 1);
    kernels.cross_entropy_rows(dce, move(targets), ce);
    kernels.kl_rows(dkl, reference, kl);
    return loss;
  };
  at::Tensor host_dce, host_dkl, device_dce, device_dkl;
  const at::Tensor host = losses(
      cpu_kernels(), [](const at::Tensor& x) { return x; }, host_dce, host_dkl);
  auto move = [this](const at::Tensor& x) { return there(x); };
  const at::Tensor device = losses(gpu(), move, device_dce, device_dkl).cpu();
  EXPECT_NEAR(device[0].item<double>() / host[0].item<double>(), 1, tolerance(dtype()));
  // A KL of near models is a difference: bfloat16 logits err by 2⁻⁸ of about 10, and 0.05 of that
  // is the difference of the two models.
  EXPECT_NEAR(device[1].item<double>() / host[1].item<double>(), 1, 10 * tolerance(dtype()));
  expect_near(device_dce, host_dce);
  at::Tensor again_ce, again_kl;
  expect_equal(losses(gpu(), move, again_ce, again_kl), device);
}

TEST_P(GpuKernels, InnerProductsAndTheUpdate) {
  const int64_t n = 1000003;
  const std::vector<at::Tensor> g = {random_tensor({n}, 15), random_tensor({n}, 16)};
  const std::vector<at::Tensor> on_gpu = {there(g[0]), there(g[1])};
  at::Tensor host = at::zeros({2, 2}, at::kDouble), device = there(host);
  cpu_kernels().add_inner_products(g, host);
  gpu().add_inner_products(on_gpu, device);
  // fp64 sums of exact products: only the order of a million roundings differs.
  EXPECT_LE((device.cpu() - host).abs().max().item<double>(), 1e-9 * host.max().item<double>());

  AdamW adamw{0.999f, 1e-8f, 0.1f, 1e-3f, 1e-2f, 1.0f, 0.99f};
  auto state = [&](auto move) {
    return ShardState{move(random_tensor({n}, 17)), move(at::zeros({n})), move(at::zeros({n})),
                      move(at::zeros({n}, dtype()))};
  };
  const ShardState cpu_state = state([](const at::Tensor& x) { return x; });
  const ShardState gpu_state = state([this](const at::Tensor& x) { return there(x); });
  const std::vector<UpdateRange> ranges = {
      {0, 1000, true}, {1000, 500000, false}, {600000, n, true}};
  cpu_kernels().update(g, {1.0, -0.5}, adamw, ranges, cpu_state);
  gpu().update(on_gpu, {1.0, -0.5}, adamw, ranges, gpu_state);
  const double moved = (cpu_state.master - random_tensor({n}, 17)).abs().max().item<double>();
  EXPECT_LE((gpu_state.master.cpu() - cpu_state.master).abs().max().item<double>(), 1e-4 * moved);
  expect_equal(gpu_state.compute.narrow(0, 0, 1000),
               gpu_state.master.narrow(0, 0, 1000).to(dtype()));
}

INSTANTIATE_TEST_SUITE_P(Types, GpuKernels, ::testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& info) { return std::string(at::toString(info.param)); });

}  // namespace
}  // namespace safegrad::testing
