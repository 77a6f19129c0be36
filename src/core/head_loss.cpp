#include "core/head_loss.h"

#include <algorithm>
#include <vector>

#include <ATen/ATen.h>

namespace safegrad {
namespace {

// Calls body(begin, rows) for chunks of [0, n).
template <typename Body>
void over_chunks(int64_t n, int64_t chunk, const Body& body) {
  for (int64_t begin = 0; begin < n; begin += chunk) body(begin, std::min(chunk, n - begin));
}

// All losses are the same loop: logits of a chunk, the loss with its gradient in their place, then
// the two products of the output matrix's backward; `use(dlogits, h_chunk, begin, rows)` is the
// second.
template <typename ChunkLoss, typename Use>
void head(const Kernels& kernels, const at::Tensor& h, const Parameter& weight, at::Tensor& dh,
          const ChunkLoss& loss, const Use& use) {
  over_chunks(h.size(0), kernels.head_chunk(), [&](int64_t begin, int64_t rows) {
    const at::Tensor h_chunk = h.narrow(0, begin, rows);
    at::Tensor logits = kernels.logits(h_chunk, weight.value);
    loss(logits, begin, rows);
    if (!dh.defined()) return;
    const at::Tensor dlogits = logits.to(h.scalar_type());
    at::Tensor dh_chunk = dh.narrow(0, begin, rows);
    at::mm_out(dh_chunk, dlogits, weight.value);
    use(dlogits, h_chunk, begin, rows);
  });
}

auto weight_gradient(Parameter& weight, size_t k) {
  return [&weight, k](const at::Tensor& dlogits, const at::Tensor& h, int64_t, int64_t) {
    if (weight.wants(k)) weight.add_product(k, dlogits, h);
  };
}

auto row_score(const Kernels& kernels, const Parameter& weight, const at::Tensor& row_scores) {
  return [&](const at::Tensor& dlogits, const at::Tensor& h, int64_t begin, int64_t rows) {
    if (!weight.direction) return;
    kernels.add_row_products(dlogits, at::mm(h, weight.direction->value.t()), 1.0,
                             row_scores.narrow(0, begin, rows));
  };
}

}  // namespace

void cross_entropy_head(const Kernels& kernels, const at::Tensor& h, const at::Tensor& targets,
                        Parameter& weight, size_t k, at::Tensor dh, at::Tensor loss,
                        const at::Tensor& row_scores) {
  auto chunk_loss = [&](at::Tensor& logits, int64_t begin, int64_t rows) {
    kernels.cross_entropy_rows(logits, targets.narrow(0, begin, rows), loss);
  };
  const auto gradient = weight_gradient(weight, k);
  const auto score = row_score(kernels, weight, row_scores);
  auto use = [&](const at::Tensor& dlogits, const at::Tensor& h_chunk, int64_t begin,
                 int64_t rows) {
    gradient(dlogits, h_chunk, begin, rows);
    if (row_scores.defined()) score(dlogits, h_chunk, begin, rows);
  };
  head(kernels, h, weight, dh, chunk_loss, use);
}

at::Tensor cross_entropy_head_scores(const Kernels& kernels, const at::Tensor& h,
                                     const at::Tensor& targets, const Parameter& weight,
                                     at::Tensor dh, const at::Tensor& row_scores) {
  const auto doubles = h.options().dtype(at::kDouble);
  at::Tensor log_p = at::empty({h.size(0)}, doubles), loss = at::zeros({1}, doubles);
  auto chunk_loss = [&](at::Tensor& logits, int64_t begin, int64_t rows) {
    const at::Tensor chosen = targets.narrow(0, begin, rows);
    log_p.narrow(0, begin, rows).copy_(log_probabilities(logits, chosen));
    kernels.cross_entropy_rows(logits, chosen, loss);
  };
  head(kernels, h, weight, dh, chunk_loss, row_score(kernels, weight, row_scores));
  return log_p;
}

void kl_head(const Kernels& kernels, const at::Tensor& h, const at::Tensor& h_ref,
             Parameter& weight, const at::Tensor& reference_weight, size_t k, at::Tensor dh,
             at::Tensor loss) {
  auto chunk_loss = [&](at::Tensor& logits, int64_t begin, int64_t rows) {
    at::Tensor reference = kernels.logits(h_ref.narrow(0, begin, rows), reference_weight);
    kernels.kl_rows(logits, reference, loss);
  };
  head(kernels, h, weight, dh, chunk_loss, weight_gradient(weight, k));
}

ScoredRows score_rows(const Kernels& kernels, const at::Tensor& h, const at::Tensor& targets,
                      const at::Tensor& weight) {
  std::vector<at::Tensor> log_p = {at::empty({0}, h.options().dtype(at::kDouble))};
  std::vector<at::Tensor> greedy = {at::empty({0}, h.options().dtype(at::kBool))};
  over_chunks(h.size(0), kernels.head_chunk(), [&](int64_t begin, int64_t rows) {
    const at::Tensor logits = kernels.logits(h.narrow(0, begin, rows), weight);
    const at::Tensor chosen = targets.narrow(0, begin, rows);
    log_p.push_back(log_probabilities(logits, chosen));
    greedy.push_back(logits.argmax(1).eq(chosen));
  });
  return {at::cat(log_p), at::cat(greedy)};
}

at::Tensor log_probabilities(const at::Tensor& logits, const at::Tensor& targets) {
  const at::Tensor x = logits.to(at::kFloat);
  const at::Tensor chosen = x.gather(1, targets.unsqueeze(1)).squeeze(1);
  return chosen.to(at::kDouble) - x.logsumexp(1).to(at::kDouble);
}

}  // namespace safegrad
