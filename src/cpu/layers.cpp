// layers.cpp: norms, rotations, activations and dropout on the CPU.

#include <algorithm>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/error.h"
#include "core/layer_math.h"
#include "cpu/cpu_kernels.h"

namespace safegrad {
namespace {

constexpr int64_t kRowGrain = 16;

// Calls body<T>() for the tensor's element type; loops are written once, and their arithmetic is
// float.
template <typename Body>
void by_dtype(const at::Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == at::kFloat) {
    body.template operator()<float>();
  } else {
    SAFEGRAD_CHECK(tensor.scalar_type() == at::kBFloat16, UsageError,
                   "layers compute in float32 or bfloat16");
    body.template operator()<at::BFloat16>();
  }
}

}  // namespace

at::Tensor CpuKernels::rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps,
                                at::Tensor& rstd) const {
  const int64_t n = x.size(0), d = x.size(1), stride = x.stride(0);
  at::Tensor y = at::empty({n, d}, x.options());
  rstd = at::empty({n}, x.options().dtype(at::kFloat));
  by_dtype(x, [&]<typename scalar_t>() {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    float* r = rstd.mutable_data_ptr<float>();
    at::parallel_for(0, n, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* row = in + i * stride;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < d; ++j) {
          const auto v = static_cast<float>(row[j]);
          square += v * v;
        }
        const float scale = rms_scale(square, static_cast<float>(d), static_cast<float>(eps));
        r[i] = scale;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) {
          out[i * d + j] = normed(static_cast<float>(row[j]), scale, static_cast<float>(w[j]));
        }
      }
    });
  });
  return y;
}

// With x̂ = x rstd:  dx = rstd (dy w − x̂ mean(dy w x̂)),  dw = Σ_rows dy x̂.
void CpuKernels::rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                   const at::Tensor& rstd, Parameter& weight,
                                   const std::vector<int64_t>& row_segments, at::Tensor& dx) const {
  const int64_t n = x.size(0), d = x.size(1);
  const float inverse_d = 1.0f / static_cast<float>(d);
  by_dtype(x, [&]<typename scalar_t>() {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    const scalar_t* gradient = dy.const_data_ptr<scalar_t>();
    const scalar_t* w = weight.value.const_data_ptr<scalar_t>();
    const float* r = rstd.const_data_ptr<float>();
    scalar_t* out = dx.mutable_data_ptr<scalar_t>();
    const int64_t x_stride = x.stride(0), dy_stride = dy.stride(0), dx_stride = dx.stride(0);
    at::parallel_for(0, n, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* xi = in + i * x_stride;
        const scalar_t* gi = gradient + i * dy_stride;
        scalar_t* oi = out + i * dx_stride;
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < d; ++j) {
          along += static_cast<float>(gi[j]) * static_cast<float>(w[j]) * static_cast<float>(xi[j]);
        }
        const float scale = r[i], pull = norm_pull(along, scale, inverse_d);
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) {
          const auto g = static_cast<float>(gi[j]), wj = static_cast<float>(w[j]);
          oi[j] = static_cast<float>(oi[j]) +
                  norm_input_gradient(g, wj, static_cast<float>(xi[j]), scale, pull);
        }
      }
    });
    for (size_t k = 0; k + 1 < row_segments.size(); ++k) {
      if (!weight.wants(k) || row_segments[k] == row_segments[k + 1]) continue;
      at::Tensor dw = at::zeros({d}, x.options().dtype(at::kFloat));
      float* sum = dw.mutable_data_ptr<float>();
      for (int64_t i = row_segments[k]; i < row_segments[k + 1]; ++i) {
        const scalar_t* xi = in + i * x_stride;
        const scalar_t* gi = gradient + i * dy_stride;
        const float scale = r[i];
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) {
          sum[j] +=
              norm_weight_gradient(static_cast<float>(gi[j]), static_cast<float>(xi[j]), scale);
        }
      }
      weight.add(k, dw.to(x.scalar_type()));
    }
  });
}

void CpuKernels::rotate(at::Tensor x, const at::Tensor& positions, const at::Tensor& cos,
                        const at::Tensor& sin, bool inverse) const {
  const int64_t tokens = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const float* cosine = cos.const_data_ptr<float>();
  const float* sine = sin.const_data_ptr<float>();
  const float sign = inverse ? -1.0f : 1.0f;
  by_dtype(x, [&]<typename scalar_t>() {
    scalar_t* data = x.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const float* c = cosine + position[t] * half;
        const float* s = sine + position[t] * half;
        for (int64_t h = 0; h < heads; ++h) {
          scalar_t* low = data + t * x.stride(0) + h * x.stride(1);
          scalar_t* high = low + half;
#pragma omp simd
          for (int64_t j = 0; j < half; ++j) {
            auto a = static_cast<float>(low[j]), b = static_cast<float>(high[j]);
            rotate_pair(a, b, c[j], sign * s[j]);
            low[j] = a;
            high[j] = b;
          }
        }
      }
    });
  });
}

at::Tensor CpuKernels::swiglu(const at::Tensor& gate_up) const {
  const int64_t tokens = gate_up.size(0), width = gate_up.size(1) / 2;
  at::Tensor act = at::empty({tokens, width}, gate_up.options());
  by_dtype(gate_up, [&]<typename scalar_t>() {
    const scalar_t* in = gate_up.const_data_ptr<scalar_t>();
    scalar_t* out = act.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const scalar_t* gate = in + 2 * t * width;
        const scalar_t* up = gate + width;
        scalar_t* o = out + t * width;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) {
          o[j] = swiglu_value(static_cast<float>(gate[j]), static_cast<float>(up[j]));
        }
      }
    });
  });
  return act;
}

void CpuKernels::swiglu_backward(const at::Tensor& dact, const at::Tensor& gate_up,
                                 at::Tensor& dgate_up, at::Tensor& act) const {
  const int64_t tokens = gate_up.size(0), width = gate_up.size(1) / 2;
  dgate_up = at::empty_like(gate_up);
  act = at::empty({tokens, width}, gate_up.options());
  by_dtype(gate_up, [&]<typename scalar_t>() {
    const scalar_t* in = gate_up.const_data_ptr<scalar_t>();
    const scalar_t* gradient = dact.const_data_ptr<scalar_t>();
    scalar_t* din = dgate_up.mutable_data_ptr<scalar_t>();
    scalar_t* out = act.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const scalar_t* gate = in + 2 * t * width;
        const scalar_t* up = gate + width;
        const scalar_t* dy = gradient + t * width;
        scalar_t* dgate = din + 2 * t * width;
        scalar_t* dup = dgate + width;
        scalar_t* o = out + t * width;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) {
          const auto g = static_cast<float>(gate[j]), u = static_cast<float>(up[j]);
          const SwigluGradient d = swiglu_gradient(g, u, static_cast<float>(dy[j]));
          o[j] = d.act;
          dup[j] = d.dup;
          dgate[j] = d.dgate;
        }
      }
    });
  });
}

at::Tensor CpuKernels::dropout(const at::Tensor& x, const PackedBatch& batch, double p,
                               uint64_t site) const {
  const int64_t d = x.size(1);
  at::Tensor y = at::empty_like(x);
  const int64_t* position = batch.positions.const_data_ptr<int64_t>();
  const int64_t* key = batch.dropout_keys.const_data_ptr<int64_t>();
  const DropoutDraw draw = DropoutDraw::of(p);
  by_dtype(x, [&]<typename scalar_t>() {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < d; j += DropoutDraw::kGroup) {
          const RandomBits bits = DropoutDraw::bits(static_cast<uint64_t>(key[t]), site,
                                                    static_cast<uint64_t>(position[t]),
                                                    static_cast<uint64_t>(j / DropoutDraw::kGroup));
          for (int64_t i = j; i < std::min(d, j + DropoutDraw::kGroup); ++i) {
            const float scale = draw.scale(bits, static_cast<int>(i - j));
            out[t * d + i] = static_cast<float>(in[t * d + i]) * scale;
          }
        }
      }
    });
  });
  return y;
}

// Not index_put_: on several threads it adds in any order.
void CpuKernels::add_rows(at::Tensor& table, const at::Tensor& rows, const at::Tensor& g) const {
  table.index_add_(0, rows, g);
}

void CpuKernels::add_row_products(const at::Tensor& a, const at::Tensor& b, double scale,
                                  at::Tensor sums) const {
  const int64_t n = a.size(0), d = a.size(1), a_stride = a.stride(0), b_stride = b.stride(0);
  double* out = sums.mutable_data_ptr<double>();
  by_dtype(a, [&]<typename scalar_t>() {
    const scalar_t* left = a.const_data_ptr<scalar_t>();
    const scalar_t* right = b.const_data_ptr<scalar_t>();
    at::parallel_for(0, n, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* x = left + i * a_stride;
        const scalar_t* y = right + i * b_stride;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < d; ++j)
          sum += gram_term(static_cast<float>(x[j]), static_cast<float>(y[j]));
        out[i] += scale * sum;
      }
    });
  });
}

const Kernels& cpu_kernels() {
  static const CpuKernels kernels;
  return kernels;
}

}  // namespace safegrad
