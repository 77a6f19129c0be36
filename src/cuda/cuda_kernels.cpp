// cuda_kernels.cpp: checks tensors and hands their pointers to the launchers of kernels.h.
#include "cuda/cuda_kernels.h"

#include <algorithm>
#include <sstream>

#include <ATen/ATen.h>

#include "core/error.h"
#include "core/gpu_limits.h"
#include "core/kernel_memory.h"
#include "cuda/kernels.h"

namespace safegrad::cuda {
namespace {

std::string described(const at::Tensor& t) {
  if (!t.defined()) return "an undefined tensor";
  std::ostringstream text;
  text << t.scalar_type() << ' ' << t.sizes() << " with strides " << t.strides();
  return text.str();
}

// `what` says what is needed of the tensor `name`.
void expect(bool holds, const char* name, const at::Tensor& t, const char* what) {
  SAFEGRAD_CHECK(holds, UsageError, "CUDA kernels: {} is {}, {} is needed", name, described(t),
                 what);
}

Element element_of(const at::Tensor& t, const char* name) {
  expect(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, name, t,
         "float32 or bfloat16");
  return t.scalar_type() == at::kFloat ? Element::f32 : Element::bf16;
}

void expect_like(const at::Tensor& t, const char* name, const at::Tensor& other) {
  expect(t.scalar_type() == other.scalar_type(), name, t, "the type of the other tensors");
}

void expect_contiguous(const at::Tensor& t, const char* name, at::ScalarType type,
                       at::IntArrayRef shape) {
  expect(t.defined() && t.scalar_type() == type && t.sizes() == shape && t.is_contiguous(), name, t,
         "a contiguous tensor of its type and shape");
}

// Elements of a row lie side by side.
void expect_rows(const at::Tensor& t, const char* name, const at::Tensor& like) {
  expect_like(t, name, like);
  expect(t.dim() == 2 && t.sizes() == like.sizes() && (t.size(1) <= 1 || t.stride(1) == 1), name, t,
         "a matrix of contiguous rows, all of one shape");
}

ConstRows rows_of(const at::Tensor& t) {
  return {t.const_data_ptr(), t.stride(0)};
}

at::Tensor scratch(at::IntArrayRef shape, at::ScalarType type, const at::Tensor& like) {
  return at::empty(shape, like.options().dtype(type));
}

}  // namespace

at::Tensor CudaKernels::rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps,
                                 at::Tensor& rstd) const {
  const Element element = element_of(x, "x");
  expect_rows(x, "x", x);
  const int64_t n = x.size(0), d = x.size(1);
  expect_contiguous(weight, "weight", x.scalar_type(), {d});
  at::Tensor y = at::empty({n, d}, x.options());
  rstd = scratch({n}, at::kFloat, x);
  cuda::rms_norm(element, rows_of(x), weight.const_data_ptr(), static_cast<float>(eps),
                 y.mutable_data_ptr(), rstd.mutable_data_ptr<float>(), n, d, stream());
  return y;
}

void CudaKernels::rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                    const at::Tensor& rstd, Parameter& weight,
                                    const std::vector<int64_t>& row_segments,
                                    at::Tensor& dx) const {
  const Element element = element_of(x, "x");
  expect_rows(x, "x", x);
  expect_rows(dy, "dy", x);
  expect_rows(dx, "dx", x);
  const int64_t n = x.size(0), d = x.size(1);
  expect_contiguous(rstd, "rstd", at::kFloat, {n});
  expect_contiguous(weight.value, "weight", x.scalar_type(), {d});
  SAFEGRAD_CHECK(row_segments.front() == 0 && row_segments.back() == n, UsageError,
                 "rms_norm_backward: segments of rows [{}, {}), but x has {} rows",
                 row_segments.front(), row_segments.back(), n);
  at::Tensor partials;
  for (size_t k = 0; k + 1 < row_segments.size(); ++k) {
    const int64_t begin = row_segments[k], rows = row_segments[k + 1] - begin;
    if (rows == 0) continue;
    NormWeightGradient gradient{};
    if (weight.wants(k)) {
      expect(weight.grads[k].is_contiguous() && weight.grads[k].numel() == d, "weight gradient",
             weight.grads[k], "a contiguous vector as long as a row");
      if (!partials.defined()) partials = scratch({norm_partials(d), d}, at::kFloat, x);
      gradient = {weight.grads[k].mutable_data_ptr(),
                  element_of(weight.grads[k], "weight gradient"), weight.fresh[k],
                  partials.mutable_data_ptr<float>()};
      weight.fresh[k] = false;
    }
    at::Tensor dx_rows = dx.narrow(0, begin, rows);
    cuda::rms_norm_backward(
        element, rows_of(dy.narrow(0, begin, rows)), rows_of(x.narrow(0, begin, rows)),
        rstd.const_data_ptr<float>() + begin, weight.value.const_data_ptr(),
        {dx_rows.mutable_data_ptr(), dx.stride(0)}, gradient, rows, d, stream());
  }
}

void CudaKernels::rotate(at::Tensor x, const at::Tensor& positions, const at::Tensor& cos,
                         const at::Tensor& sin, bool inverse) const {
  const Element element = element_of(x, "x");
  const bool heads_together = x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1) &&
                              (x.size(1) <= 1 || x.stride(1) == x.size(2));
  expect(heads_together && x.size(2) % 2 == 0, "x", x,
         "[tokens, heads, even width] with heads side by side");
  const int64_t tokens = x.size(0), half = x.size(2) / 2;
  expect_contiguous(positions, "positions", at::kLong, {tokens});
  expect_contiguous(cos, "cos", at::kFloat, {cos.size(0), half});
  expect_contiguous(sin, "sin", at::kFloat, cos.sizes());
  cuda::rotate(element, {x.mutable_data_ptr(), x.stride(0)}, positions.const_data_ptr<int64_t>(),
               cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), inverse, tokens, x.size(1),
               x.size(2), stream());
}

at::Tensor CudaKernels::swiglu(const at::Tensor& gate_up) const {
  const Element element = element_of(gate_up, "gate_up");
  expect(gate_up.dim() == 2 && gate_up.is_contiguous() && gate_up.size(1) % 2 == 0, "gate_up",
         gate_up, "a contiguous [tokens, 2 width]");
  const int64_t tokens = gate_up.size(0), width = gate_up.size(1) / 2;
  at::Tensor act = at::empty({tokens, width}, gate_up.options());
  cuda::swiglu(element, gate_up.const_data_ptr(), act.mutable_data_ptr(), tokens, width, stream());
  return act;
}

void CudaKernels::swiglu_backward(const at::Tensor& dact, const at::Tensor& gate_up,
                                  at::Tensor& dgate_up, at::Tensor& act) const {
  const Element element = element_of(gate_up, "gate_up");
  expect(gate_up.dim() == 2 && gate_up.is_contiguous() && gate_up.size(1) % 2 == 0, "gate_up",
         gate_up, "a contiguous [tokens, 2 width]");
  const int64_t tokens = gate_up.size(0), width = gate_up.size(1) / 2;
  expect_contiguous(dact, "dact", gate_up.scalar_type(), {tokens, width});
  dgate_up = at::empty_like(gate_up);
  act = at::empty({tokens, width}, gate_up.options());
  cuda::swiglu_backward(element, dact.const_data_ptr(), gate_up.const_data_ptr(),
                        dgate_up.mutable_data_ptr(), act.mutable_data_ptr(), tokens, width,
                        stream());
}

at::Tensor CudaKernels::dropout(const at::Tensor& x, const PackedBatch& batch, double p,
                                uint64_t site) const {
  const Element element = element_of(x, "x");
  expect(x.dim() == 2 && x.is_contiguous(), "x", x, "a contiguous [tokens, width]");
  expect_contiguous(batch.dropout_keys, "dropout_keys", at::kLong, {x.size(0)});
  expect_contiguous(batch.positions, "positions", at::kLong, {x.size(0)});
  at::Tensor y = at::empty_like(x);
  cuda::dropout(element, x.const_data_ptr(), batch.dropout_keys.const_data_ptr<int64_t>(),
                batch.positions.const_data_ptr<int64_t>(), site, DropoutDraw::of(p),
                y.mutable_data_ptr(), x.size(0), x.size(1), stream());
  return y;
}

void CudaKernels::require(const AttentionShape& shape, int64_t width) const {
  require_gpu_norms(width, shape.head_dim);
}

// Not index_add_: on a GPU it adds in any order. Unsafe: the token file's ids were checked, and a
// check here would wait for the GPU.
void CudaKernels::add_rows(at::Tensor& table, const at::Tensor& rows, const at::Tensor& g) const {
  at::_index_put_impl_(table, {rows}, g, /*accumulate=*/true, /*unsafe=*/true);
}

void CudaKernels::add_row_products(const at::Tensor& a, const at::Tensor& b, double scale,
                                   at::Tensor sums) const {
  const Element element = element_of(a, "a");
  expect_rows(a, "a", a);
  expect_rows(b, "b", a);
  expect_contiguous(sums, "sums", at::kDouble, {a.size(0)});
  cuda::add_row_products(element, rows_of(a), rows_of(b), scale, sums.mutable_data_ptr<double>(),
                         a.size(0), a.size(1), stream());
}

int64_t CudaKernels::head_chunk() const {
  return kGpuHeadChunk;
}

at::Tensor CudaKernels::logits(const at::Tensor& h, const at::Tensor& weight) const {
  return at::mm(h, weight.t());
}

void CudaKernels::cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets,
                                     at::Tensor& loss) const {
  const Element element = element_of(logits, "logits");
  expect(logits.dim() == 2 && logits.is_contiguous(), "logits", logits, "a contiguous matrix");
  const int64_t rows = logits.size(0);
  expect_contiguous(targets, "targets", at::kLong, {rows});
  expect_contiguous(loss, "loss", at::kDouble, {1});
  const at::Tensor row_losses = scratch({rows}, at::kDouble, logits);
  cuda::cross_entropy_rows(element, logits.mutable_data_ptr(), targets.const_data_ptr<int64_t>(),
                           row_losses.mutable_data_ptr<double>(), loss.mutable_data_ptr<double>(),
                           rows, logits.size(1), stream());
}

void CudaKernels::kl_rows(at::Tensor& logits, at::Tensor& reference, at::Tensor& loss) const {
  const Element element = element_of(logits, "logits");
  expect(logits.dim() == 2 && logits.is_contiguous(), "logits", logits, "a contiguous matrix");
  expect_contiguous(reference, "reference logits", logits.scalar_type(), logits.sizes());
  expect_contiguous(loss, "loss", at::kDouble, {1});
  const int64_t rows = logits.size(0);
  const at::Tensor row_losses = scratch({rows}, at::kDouble, logits);
  cuda::kl_rows(element, logits.mutable_data_ptr(), reference.const_data_ptr(),
                row_losses.mutable_data_ptr<double>(), loss.mutable_data_ptr<double>(), rows,
                logits.size(1), stream());
}

void CudaKernels::add_inner_products(const std::vector<at::Tensor>& gradients,
                                     at::Tensor gram) const {
  const auto count = static_cast<int64_t>(gradients.size());
  const int64_t size = gradients.at(0).numel();
  std::vector<const float*> pointers;
  for (const at::Tensor& g : gradients) {
    expect_contiguous(g, "gradient", at::kFloat, {size});
    pointers.push_back(g.const_data_ptr<float>());
  }
  expect_contiguous(gram, "gram", at::kDouble, {count, count});
  const at::Tensor partials =
      scratch({gram_partials(static_cast<int>(count), size)}, at::kDouble, gradients[0]);
  cuda::add_inner_products(pointers.data(), static_cast<int>(count), size,
                           partials.mutable_data_ptr<double>(), gram.mutable_data_ptr<double>(),
                           stream());
}

void CudaKernels::update(const std::vector<at::Tensor>& gradients,
                         const std::vector<double>& coefficients, const AdamW& adamw,
                         const std::vector<UpdateRange>& ranges, const ShardState& shard) const {
  const int64_t size = shard.master.numel();
  SAFEGRAD_CHECK(
      gradients.size() == coefficients.size() && gradients.size() <= kMaxGradients, UsageError,
      "CUDA kernels: an update from {} gradients with {} coefficients, at most {} are supported",
      gradients.size(), coefficients.size(), kMaxGradients);
  UpdateArguments arguments{};
  arguments.count = static_cast<int>(gradients.size());
  for (size_t k = 0; k < gradients.size(); ++k) {
    expect_contiguous(gradients[k], "gradient", at::kFloat, {size});
    arguments.gradients[k] = gradients[k].const_data_ptr<float>();
    arguments.coefficients[k] = static_cast<float>(coefficients[k]);
  }
  for (const at::Tensor* t : {&shard.master, &shard.m, &shard.v}) {
    expect_contiguous(*t, "shard", at::kFloat, {size});
  }
  arguments.master = shard.master.mutable_data_ptr<float>();
  arguments.m = shard.m.mutable_data_ptr<float>();
  arguments.v = shard.v.mutable_data_ptr<float>();
  if (!shard.compute.is_same(shard.master)) {
    arguments.element = element_of(shard.compute, "compute copy");
    expect_contiguous(shard.compute, "compute copy", shard.compute.scalar_type(), {size});
    arguments.compute = shard.compute.mutable_data_ptr();
  }
  std::vector<Range> list;
  for (const UpdateRange& range : ranges) {
    SAFEGRAD_CHECK(0 <= range.begin && range.begin <= range.end && range.end <= size, UsageError,
                   "CUDA kernels: update of [{}, {}) of a shard of {} elements", range.begin,
                   range.end, size);
    list.push_back({range.begin, range.end, range.decays});
  }
  cuda::update(arguments, adamw, list.data(), static_cast<int64_t>(list.size()), stream());
}

}  // namespace safegrad::cuda
