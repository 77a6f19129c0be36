// bench_kernels: time and share of the card's bandwidth of every CUDA kernel, at the shapes of an
// 8B Llama: one JSON line each.
//
//   bench_kernels [--repeats 20]
//
// `bytes` are those that a kernel must move: each input read once, each output written once. The
// bandwidth that `share` refers to is that of a device-to-device copy of 1 GiB in the same run,
// read and written bytes together. Medians; before each repeat 512 MiB are written, so that nothing
// is left in the second-level cache.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "core/error.h"
#include "cuda/check.h"
#include "cuda/kernels.h"

namespace safegrad::cuda {
namespace {

constexpr int64_t kTokens = 8192, kWidth = 4096, kHidden = 14336, kHeads = 40, kHeadDim = 128;
constexpr int64_t kRows = 1024, kWords = 128256, kShard = 64 << 20;
constexpr int64_t kBf16 = 2, kF32 = 4;
constexpr int kWarmUps = 3;

// Device memory filled with a byte: 0x3C gives 0.0115 in bf16 and in f32.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int fill = 0x3C) : bytes_(static_cast<size_t>(bytes)) {
    check(cudaMalloc(&data_, bytes_), "cudaMalloc");
    check(cudaMemset(data_, fill, bytes_), "cudaMemset");
  }
  explicit Buffer(const std::vector<int64_t>& values)
      : Buffer(static_cast<int64_t>(values.size() * sizeof(int64_t))) {
    check(cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T = void>
  T* get() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

class Bench {
 public:
  explicit Bench(int repeats) : repeats_(repeats), flush_(512 << 20) {
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
    cudaDeviceProp card;
    check(cudaGetDeviceProperties(&card, 0), "cudaGetDeviceProperties");
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    const Buffer from(1 << 30), to(1 << 30);
    const double ms = median_ms([&] {
      check(cudaMemcpyAsync(to.get(), from.get(), to.bytes(), cudaMemcpyDeviceToDevice, nullptr),
            "cudaMemcpyAsync");
    });
    copy_gb_s_ = 2.0 * static_cast<double>(to.bytes()) / ms * 1e-6;
    fmt::print(R"({{"kernel": "copy", "card": "{}", "driver": {}, "repeats": {}, "gb_s": {:.1f}}})"
               "\n",
               card.name, driver, repeats_, copy_gb_s_);
  }
  ~Bench() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  void run(const std::string& name, const std::string& shape, int64_t bytes,
           const std::function<void()>& launch) {
    const double ms = median_ms(launch), gb_s = static_cast<double>(bytes) / ms * 1e-6;
    fmt::print(R"({{"kernel": "{}", "shape": "{}", "bytes": {}, "ms": {:.4f}, "gb_s": {:.1f}, )"
               R"("share": {:.3f}}})"
               "\n",
               name, shape, bytes, ms, gb_s, gb_s / copy_gb_s_);
    std::fflush(stdout);
  }

 private:
  double median_ms(const std::function<void()>& launch) {
    std::vector<float> times;
    for (int i = 0; i < kWarmUps + repeats_; ++i) {
      check(cudaMemsetAsync(flush_.get(), i, flush_.bytes(), nullptr), "cudaMemsetAsync");
      check(cudaEventRecord(begin_, nullptr), "cudaEventRecord");
      launch();
      check(cudaEventRecord(end_, nullptr), "cudaEventRecord");
      check(cudaEventSynchronize(end_), "cudaEventSynchronize");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
      if (i >= kWarmUps) times.push_back(ms);
    }
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
    std::nth_element(times.begin(), middle, times.end());
    return *middle;
  }

  int repeats_;
  Buffer flush_;
  cudaEvent_t begin_, end_;
  double copy_gb_s_;
};

// What a kernel left is a number: a benchmark of NaN would measure nothing.
void expect_finite(const Buffer& buffer, const char* what) {
  double value = 0;
  check(cudaMemcpy(&value, buffer.get(), sizeof value, cudaMemcpyDeviceToHost), "cudaMemcpy");
  SAFEGRAD_CHECK(std::isfinite(value), RunError, "bench_kernels: {} is {}", what, value);
}

std::vector<int64_t> counted(int64_t n, int64_t below) {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < n; ++i) values.push_back(i * 7919 % below);
  return values;
}

void bench_layers(Bench& bench) {
  const auto element = Element::bf16;
  const int64_t rows = kTokens * kWidth * kBf16, hidden = kTokens * kHidden * kBf16;
  const std::string shape = fmt::format("{} x {} bf16", kTokens, kWidth);
  {
    const Buffer x(rows), dy(rows), y(rows), weight(kWidth * kBf16), gradient(kWidth * kBf16);
    const Buffer rstd(kTokens * kF32), partials(norm_partials(kWidth) * kWidth * kF32);
    const Buffer keys(counted(kTokens, 16)), positions(counted(kTokens, 1024));
    bench.run("rms_norm", shape, 2 * rows, [&] {
      rms_norm(element, {x.get(), kWidth}, weight.get(), 1e-5f, y.get(), rstd.get<float>(), kTokens,
               kWidth, nullptr);
    });
    const NormWeightGradient dw{gradient.get(), element, true, partials.get<float>()};
    bench.run("rms_norm_backward", shape, 4 * rows, [&] {
      rms_norm_backward(element, {dy.get(), kWidth}, {x.get(), kWidth}, rstd.get<float>(),
                        weight.get(), {y.get(), kWidth}, dw, kTokens, kWidth, nullptr);
    });
    bench.run("dropout", shape, 2 * rows, [&] {
      dropout(element, x.get(), keys.get<int64_t>(), positions.get<int64_t>(), 1,
              DropoutDraw::of(0.1), y.get(), kTokens, kWidth, nullptr);
    });
  }
  {
    const int64_t columns = kHeads * kHeadDim;
    const Buffer x(kTokens * columns * kBf16), positions(counted(kTokens, 1024));
    const Buffer table(1024 * kHeadDim / 2 * kF32);
    bench.run("rotate", fmt::format("{} x {} x {} bf16", kTokens, kHeads, kHeadDim),
              2 * kTokens * columns * kBf16, [&] {
                rotate(element, {x.get(), columns}, positions.get<int64_t>(), table.get<float>(),
                       table.get<float>(), false, kTokens, kHeads, kHeadDim, nullptr);
              });
  }
  const Buffer gate_up(2 * hidden), dgate_up(2 * hidden), dact(hidden), act(hidden);
  const std::string wide = fmt::format("{} x {} bf16", kTokens, kHidden);
  bench.run("swiglu", wide, 3 * hidden,
            [&] { swiglu(element, gate_up.get(), act.get(), kTokens, kHidden, nullptr); });
  bench.run("swiglu_backward", wide, 6 * hidden, [&] {
    swiglu_backward(element, dact.get(), gate_up.get(), dgate_up.get(), act.get(), kTokens, kHidden,
                    nullptr);
  });
}

void bench_losses(Bench& bench) {
  for (Element element : {Element::bf16, Element::f32}) {
    const bool narrow = element == Element::bf16;
    const int64_t bytes = kRows * kWords * (narrow ? kBf16 : kF32);
    const Buffer logits(bytes), reference(bytes), targets(counted(kRows, kWords));
    const Buffer row_losses(kRows * 8), loss(8, 0);
    const std::string shape = fmt::format("{} x {} {}", kRows, kWords, narrow ? "bf16" : "f32");
    bench.run("cross_entropy_rows", shape, 2 * bytes, [&] {
      cross_entropy_rows(element, logits.get(), targets.get<int64_t>(), row_losses.get<double>(),
                         loss.get<double>(), kRows, kWords, nullptr);
    });
    bench.run("kl_rows", shape, 3 * bytes, [&] {
      kl_rows(element, logits.get(), reference.get(), row_losses.get<double>(), loss.get<double>(),
              kRows, kWords, nullptr);
    });
    expect_finite(loss, "the loss");
  }
}

void bench_update(Bench& bench) {
  const Buffer u(kShard * kF32), a(kShard * kF32), master(kShard * kF32), m(kShard * kF32);
  const Buffer v(kShard * kF32), compute(kShard * kBf16), gram(4 * 8, 0);
  const Buffer partials(gram_partials(2, kShard) * 8);
  const float* gradients[] = {u.get<float>(), a.get<float>()};
  const std::string shape = fmt::format("{} elements, 2 gradients", kShard);
  bench.run("add_inner_products", shape, 2 * kShard * kF32, [&] {
    add_inner_products(gradients, 2, kShard, partials.get<double>(), gram.get<double>(), nullptr);
  });
  expect_finite(gram, "an inner product");
  UpdateArguments arguments{};
  arguments.gradients[0] = u.get<float>();
  arguments.gradients[1] = a.get<float>();
  arguments.coefficients[0] = arguments.coefficients[1] = 1e-3f;
  arguments.count = 2;
  arguments.master = master.get<float>();
  arguments.m = m.get<float>();
  arguments.v = v.get<float>();
  arguments.compute = compute.get();
  arguments.element = Element::bf16;
  const AdamW adamw{.beta2 = 0.999f,
                    .eps = 1e-8f,
                    .rest1 = 0.1f,
                    .rest2 = 1e-3f,
                    .step_size = 1e-5f,
                    .inverse_sqrt_bc2 = 1.0f,
                    .decay = 1.0f};
  const Range ranges[] = {{0, kShard - kWidth, true}, {kShard - kWidth, kShard, false}};
  bench.run("update", shape, kShard * (5 * kF32 + 3 * kF32 + kBf16),
            [&] { update(arguments, adamw, ranges, 2, nullptr); });
}

}  // namespace
}  // namespace safegrad::cuda

int main(int argc, char** argv) {
  int repeats = 20;
  if (argc == 3 && std::strcmp(argv[1], "--repeats") == 0) repeats = std::atoi(argv[2]);
  if ((argc != 1 && argc != 3) || repeats < 1) {
    std::fputs("usage: bench_kernels [--repeats N], N >= 1\n", stderr);
    return 1;
  }
  try {
    safegrad::cuda::Bench bench(repeats);
    safegrad::cuda::bench_layers(bench);
    safegrad::cuda::bench_losses(bench);
    safegrad::cuda::bench_update(bench);
  } catch (const safegrad::Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return error.exit_code();
  }
}
