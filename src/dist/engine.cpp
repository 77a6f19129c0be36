#include "dist/engine.h"

#include <algorithm>
#include <utility>

#include <ATen/ATen.h>

#include "core/error.h"
#include "core/head_loss.h"
#include "dist/directions.h"
#include "dist/engine_schedule.h"

namespace safegrad::dist {

Engine::Engine(CausalLM& model, Mesh& mesh, EngineOptions options)
    : model_(model),
      mesh_(mesh),
      options_(std::move(options)),
      buffers_{BufferPool([&mesh](int64_t numel, at::ScalarType dtype) {
                 return mesh.shard_group().allocate_gather_output(numel, dtype);
               }),
               BufferPool([&mesh](int64_t numel, at::ScalarType dtype) {
                 return mesh.shard_group().allocate_reduce_input(numel, dtype);
               }),
               BufferPool([device = model.backend().device()](int64_t numel, at::ScalarType dtype) {
                 return at::empty({numel}, at::TensorOptions().dtype(dtype).device(device));
               })},
      clock_(model.backend()),
      blocks_(block_names(model.units())) {
  options_.sharding.device = backend().device();
  units_.reserve(model_.units().size());
  for (const Unit& unit : model_.units()) {
    units_.emplace_back(unit, objectives(), options_.sharding, mesh_, buffers_);
  }
  if (options_.keep_reference_head) {
    frozen_head_ = std::make_unique<Parameter>(model_.head());
    frozen_head_->trainable = false;
    frozen_head_unit_ =
        std::make_unique<ShardedUnit>(Unit{"reference head", {frozen_head_.get()}, false},
                                      objectives(), options_.sharding, mesh_, buffers_);
  }
  if (options_.keep_direction)
    directions_ = std::make_unique<Directions>(model_, options_.sharding, mesh_, buffers_);
}

Engine::~Engine() = default;

void Engine::load(const WeightSource& weights) {
  agree(mesh_.world(), [&] {
    for (ShardedUnit& unit : units_) unit.load(weights);
    if (frozen_head_unit_) frozen_head_unit_->load(weights);
  });
}

void Engine::load_reference_head(const WeightSource& weights) {
  agree(mesh_.world(), [&] { frozen_head_unit_->load(weights); });
}

// Before: every rank's backward is over, since all have sent the step's scalars. After: ranks that
// see each other's shards must not read one that is still being written.
void Engine::update(const std::vector<std::vector<double>>& coefficients, const AdamW& adamw) {
  clock_.enter(Phase::optimizer);
  for (ShardedUnit& unit : units_) unit.update(kernels(), blocks_, coefficients, adamw);
  clock_.enter(Phase::wait);
  mesh_.shard_group().about("update");
  mesh_.shard_group().finish_shard_writes();
}

uint64_t Engine::fingerprint() {
  uint64_t sum = 0;
  for (const ShardedUnit& unit : units_) sum += unit.fingerprint();
  const auto all = mesh_.shard_group().all_gather_words(std::span(&sum, 1));
  uint64_t total = 0;
  for (uint64_t part : all) total += part;
  return total;
}

void Engine::begin_step(bool scores) {
  computed_.clear();
  clock_.enter(Phase::gather);
  for (size_t u = 0; u < units_.size(); ++u) {
    if (!units_[u].unit().resident) continue;
    for (ShardedUnit* unit : group_of({u}, scores)) unit->finish_gather();
  }
}

void Engine::end_step() {
  clock_.enter(Phase::reduce);
  for (ShardedUnit& unit : units_) {
    if (!unit.unit().resident) continue;
    unit.start_reduce();
    unit.finish_reduce();
  }
  release_resident();
  for (ShardedUnit& unit : units_) unit.reduce_replicas(computed_);
}

void Engine::release_resident() {
  for (size_t u = 0; u < units_.size(); ++u) {
    if (!units_[u].unit().resident) continue;
    for (ShardedUnit* unit : group_of({u}, directions_ != nullptr)) unit->release();
  }
}

std::vector<ShardedUnit*> Engine::head_group(bool directions) {
  std::vector<ShardedUnit*> group = group_of(model_.head_units(), directions);
  if (frozen_head_unit_) group.push_back(frozen_head_unit_.get());
  return group;
}

// Of a pass with a backward; `head`: what the head reads.
std::vector<ShardedUnit*> Engine::gather_order(const std::vector<ShardedUnit*>& head, bool scores) {
  std::vector<ShardedUnit*> order = {&units_[model_.embedding_unit()]};
  auto append = [&order](const std::vector<ShardedUnit*>& more) {
    order.insert(order.end(), more.begin(), more.end());
  };
  for (int64_t b = 0; b < model_.blocks(); ++b) order.push_back(&units_[model_.block_unit(b)]);
  append(head);
  const int64_t lowest = model_.lowest_trainable_block();
  for (int64_t b = model_.blocks() - 1; b >= std::max<int64_t>(0, lowest); --b)
    append(group_of({model_.block_unit(b)}, scores));
  if (scores && lowest < 0) order.push_back(directions_->of(model_.embedding_unit()));
  return order;
}

Parameter& Engine::reference_head() {
  return frozen_head_ ? *frozen_head_ : model_.head();
}

at::Tensor Engine::run_blocks(const PackedBatch& batch, GatherQueue& gathers, int64_t lowest_kept,
                              Kept* kept) {
  gathers.next();
  clock_.enter(Phase::forward);
  at::Tensor x = model_.embed(batch);
  units_[model_.embedding_unit()].release();
  for (int64_t b = 0; b < model_.blocks(); ++b) {
    gathers.next();
    clock_.enter(Phase::forward);
    std::unique_ptr<Activations> activations;
    const bool keep = kept && b >= lowest_kept;
    if (keep) kept->inputs[static_cast<size_t>(b)] = x;
    const bool keep_all = keep && options_.recompute == Recompute::none;
    x = model_.forward_block(b, x, batch, keep_all ? &activations : nullptr);
    if (keep_all) kept->activations[static_cast<size_t>(b)] = std::move(activations);
    units_[model_.block_unit(b)].release();
  }
  return x;
}

void Engine::score(const PackedBatch& batch, size_t k, const at::Tensor& h, at::Tensor& dh,
                   const at::Tensor& loss, const at::Tensor& row_scores) {
  const int64_t begin = batch.scored_segments[k], rows = batch.scored_segments[k + 1] - begin;
  const at::Tensor h_k = h.narrow(0, begin, rows);
  const at::Tensor dh_k = dh.narrow(0, begin, rows);
  if (options_.losses[k] == Loss::kl) {
    kl_head(kernels(), h_k, batch.reference_hidden, model_.head(), reference_head().value, k, dh_k,
            loss);
  } else {
    cross_entropy_head(kernels(), h_k, batch.targets.narrow(0, begin, rows), model_.head(), k, dh_k,
                       loss, k == 0 ? row_scores : at::Tensor());
  }
}

// dx [T, D] of the last block's output. Logits exist only for scored rows, a chunk at a time.
at::Tensor Engine::head_forward_backward(const PackedBatch& batch, const at::Tensor& x,
                                         const std::vector<ShardedUnit*>& group,
                                         GatherQueue& gathers, PassSums& sums) {
  gathers.next(group.size());
  clock_.enter(Phase::head);
  for (size_t i : model_.head_units()) units_[i].lend_gradients(active_, first_);
  const at::Tensor x_scored = x.index_select(0, batch.scored);
  const at::Tensor h = model_.final_norm(x_scored);
  at::Tensor dh = at::empty_like(h);
  at::Tensor row_scores;
  if (batch.token_scores.defined())
    row_scores = at::zeros({batch.scored_segments[1]}, batch.token_scores.options());
  for (size_t k : active_)
    score(batch, k, h, dh, sums.loss.narrow(0, static_cast<int64_t>(k), 1), row_scores);
  if (row_scores.defined()) add_row_scores(batch, row_scores);
  at::Tensor dx = at::zeros_like(x);
  dx.index_copy_(0, batch.scored, model_.final_norm_backward(x_scored, dh, batch));
  for (ShardedUnit* unit : group) unit->release();
  return dx;
}

void Engine::blocks_backward(const PackedBatch& batch, GatherQueue& gathers, Kept& kept,
                             at::Tensor dx) {
  const int64_t lowest = std::max<int64_t>(0, model_.lowest_trainable_block());
  for (int64_t b = model_.blocks() - 1; b >= lowest; --b) {
    ShardedUnit& unit = units_[model_.block_unit(b)];
    const auto group = group_of({model_.block_unit(b)}, batch.token_scores.defined());
    gathers.next(group.size());
    clock_.enter(Phase::backward);
    auto& activations = kept.activations[static_cast<size_t>(b)];
    if (!activations)
      model_.forward_block(b, kept.inputs[static_cast<size_t>(b)], batch, &activations);
    kept.inputs[static_cast<size_t>(b)].reset();
    unit.lend_gradients(active_, first_);
    const bool need_dx = b > lowest || model_.lowest_trainable_block() < 0;
    dx = model_.backward_block(b, std::move(activations), std::move(dx), batch, need_dx);
    for (ShardedUnit* read : group) read->release();
    clock_.enter(Phase::reduce);
    unit.start_reduce();
    if (reducing_) reducing_->finish_reduce();
    reducing_ = &unit;
  }
  if (model_.lowest_trainable_block() >= 0) return;
  units_[model_.embedding_unit()].lend_gradients(active_, first_);  // tied: the head's buffer
  if (batch.token_scores.defined()) gathers.next();
  clock_.enter(Phase::backward);
  model_.embed_backward(batch, dx);
  if (batch.token_scores.defined()) directions_->of(model_.embedding_unit())->release();
}

void Engine::set_anchor() {
  for (ShardedUnit& unit : units_) unit.set_anchor();
}

void Engine::measure_drift(size_t k) {
  for (ShardedUnit& unit : units_) unit.measure_drift(k);
}

PassSums Engine::zero_sums() const {
  const auto doubles = at::TensorOptions().dtype(at::kDouble).device(backend().device());
  return {at::zeros({static_cast<int64_t>(objectives())}, doubles), 0.0};
}

at::Tensor Engine::inner_products() const {
  const auto k = static_cast<int64_t>(objectives());
  at::Tensor grams = at::zeros({static_cast<int64_t>(blocks_.size()), k, k},
                               at::TensorOptions().dtype(at::kDouble).device(backend().device()));
  for (const ShardedUnit& unit : units_) unit.add_inner_products(kernels(), blocks_, grams);
  return grams;
}

void Engine::forward_backward(const PackedBatch& batch, const std::vector<size_t>& active,
                              bool first, PassSums& sums) {
  active_ = active;
  first_ = first;
  for (size_t k : active) {
    const auto place = std::lower_bound(computed_.begin(), computed_.end(), k);
    if (place == computed_.end() || *place != k) computed_.insert(place, k);
  }
  const bool scores = batch.token_scores.defined();
  const auto head = head_group(scores);
  GatherQueue gathers(gather_order(head, scores), clock_);

  if (model_.adapter_unit() >= 0)
    units_[static_cast<size_t>(model_.adapter_unit())].lend_gradients(active_, first_);
  const Flops flops = model_.flops(batch);
  sums.flops += flops.total() + (scores ? flops.scores : 0.0);
  Kept kept(model_.blocks());
  const int64_t lowest = std::max<int64_t>(0, model_.lowest_trainable_block());
  at::Tensor x = run_blocks(batch, gathers, lowest, &kept);
  at::Tensor dx = head_forward_backward(batch, x, head, gathers, sums);
  x.reset();
  for (size_t k : active_) {
    if (options_.losses[k] != Loss::kl) continue;
    const int64_t rows = batch.scored_segments[k + 1] - batch.scored_segments[k];
    sums.flops += 2.0 * static_cast<double>(rows * reference_head().numel());
  }
  blocks_backward(batch, gathers, kept, std::move(dx));
  if (scores) append_scores(batch, sums);
  reduce_last();
  clock_.enter(Phase::other);
}

// The head's gradients (and a tied embedding's, complete only now) are reduced last.
void Engine::reduce_last() {
  clock_.enter(Phase::reduce);
  std::vector<size_t> last = model_.head_units();
  const size_t embedding = model_.embedding_unit();
  const bool separate_embedding = std::find(last.begin(), last.end(), embedding) == last.end();
  for (size_t i : last) units_[i].start_reduce();
  if (reducing_) reducing_->finish_reduce();
  reducing_ = nullptr;
  for (size_t i : last) units_[i].finish_reduce();
  if (separate_embedding) {
    units_[embedding].start_reduce();
    units_[embedding].finish_reduce();
  }
}

at::Tensor Engine::hidden(const PackedBatch& batch) {
  std::vector<ShardedUnit*> order = {&units_[model_.embedding_unit()]};
  for (int64_t b = 0; b < model_.blocks(); ++b) order.push_back(&units_[model_.block_unit(b)]);
  const size_t norm_unit = model_.head_units().back();
  order.push_back(&units_[norm_unit]);
  GatherQueue gathers(std::move(order), clock_);
  const at::Tensor x = run_blocks(batch, gathers, 0, nullptr);
  gathers.next();
  const at::Tensor h = model_.final_norm(x.index_select(0, batch.scored));
  units_[norm_unit].release();
  clock_.enter(Phase::other);
  return h;
}

void Engine::with_head(const std::function<void(Parameter&, Parameter&)>& use) {
  const auto group = head_group();
  for (ShardedUnit* unit : group) unit->start_gather();
  for (ShardedUnit* unit : group) unit->finish_gather();
  use(model_.head(), reference_head());
  for (ShardedUnit* unit : group) unit->release();
}

}  // namespace safegrad::dist
