#include "dist/estimate.h"

#include <algorithm>

#include <fmt/format.h>

namespace safegrad::dist {
namespace {

constexpr int64_t kFloat = 4, kIndex = 8;

constexpr int64_t Memory::*kParts[] = {&Memory::weights,   &Memory::optimizer,   &Memory::gradients,
                                       &Memory::buffers,   &Memory::activations, &Memory::logits,
                                       &Memory::reference, &Memory::checkpoint};

int64_t rows_of(const PackedBatch& batch, size_t k) {
  return batch.scored_segments[k + 1] - batch.scored_segments[k];
}

}  // namespace

int64_t Memory::total() const {
  int64_t sum = 0;
  for (auto part : kParts) sum += this->*part;
  return sum;
}

void MemoryEstimate::join(const MemoryEstimate& other) {
  if (other.peak() > peak()) {
    at_peak = other.at_peak;
    moment = other.moment;
  }
  for (auto part : kParts) largest.*part = std::max(largest.*part, other.largest.*part);
}

int64_t batch_bytes(const PackedBatch& batch, bool dropout) {
  const int64_t scored = batch.scored_segments.back();
  const int64_t indices = batch.size() * (dropout ? 3 : 2) + 2 * scored;
  const auto losses = static_cast<int64_t>(batch.objectives());  // their sums, fp64
  return (indices + losses) * kIndex + (batch.sequences() + 1) * 4;
}

Estimator::Estimator(CausalLM& model, const EngineOptions& options, const Layout& layout,
                     const KernelMemory& kernels, bool dropout,
                     std::vector<std::vector<size_t>> passes)
    : model_(model),
      options_(options),
      layout_(layout),
      kernels_(kernels),
      dropout_(dropout),
      passes_(std::move(passes)) {
  const bool replicate = options.sharding.replicate_frozen;
  for (const Unit& unit : model.units()) units_.push_back(size_of(unit, layout, replicate));
  if (options.keep_reference_head) {
    Parameter frozen = model.head();
    frozen.trainable = false;
    units_.push_back(size_of({"reference head", {&frozen}, false}, layout, replicate));
  }
  const auto compute = static_cast<int64_t>(c10::elementSize(options.sharding.compute_dtype));
  const auto objectives = static_cast<int64_t>(options.losses.size());
  for (const UnitSize& unit : units_) {
    persistent_.weights += (unit.trainable.shard + unit.frozen.shard) * compute;
    persistent_.optimizer += unit.trainable.shard * kFloat * (compute == kFloat ? 2 : 3);
    if (options.keep_anchor) persistent_.optimizer += unit.trainable.shard * kFloat;
    persistent_.gradients += unit.trainable.shard * kFloat * objectives;
    if (options.keep_direction) persistent_.weights += unit.trainable.shard * compute;
  }
  for (int64_t micro_batches : {1, 2}) walks_.push_back(walk_step(micro_batches, passes_));
  reference_buffers_ = walk_step(1, {{}}).gather_buffers();  // no objective: gathers alone
}

Walk Estimator::walk_step(int64_t micro_batches,
                          const std::vector<std::vector<size_t>>& passes) const {
  Walk walk(model_, options_, layout_, units_, options_.keep_reference_head);
  walk.step(micro_batches, passes);
  return walk;
}

std::map<std::string, Traffic> Estimator::traffic(int64_t micro_batches,
                                                  const std::vector<std::vector<size_t>>& passes,
                                                  int64_t scalars) const {
  auto traffic = walk_step(micro_batches, passes).traffic();
  traffic["scalars"] = {1, (layout_.ranks - 1) * scalars * static_cast<int64_t>(sizeof(double))};
  return traffic;
}

MemoryEstimate Estimator::memory(const std::vector<std::vector<PackedBatch>>& micro_batches) const {
  const Walk& walk = walks_[micro_batches.size() > 1];  // a second one finds gradients to add to
  MemoryEstimate estimate;
  for (const auto& batches : micro_batches) {
    for (const PackedBatch& batch : batches) add_batch(batch, walk, estimate);
  }
  return estimate;
}

// Engine::head_forward_backward: x_scored, h and dh of the scored rows and logits of a chunk; then
// dx, and the norm's backward with a temporary of the scored rows. A score takes a product as large
// as the logits.
Memory Estimator::work_of_head(const PackedBatch& batch) const {
  const int64_t row = model_.width() * kernels_.element;
  Memory head;
  for (size_t k = 0; k < options_.losses.size(); ++k) {
    const int64_t n = std::min(kernels_.head_chunk(), rows_of(batch, k));
    head.logits = std::max(head.logits,
                           kernels_.logits(n, model_.vocab_size(), options_.losses[k] == Loss::kl) +
                               (k == 0 && options_.keep_direction && model_.head().trainable
                                    ? n * model_.vocab_size() * kernels_.element
                                    : 0));
  }
  head.activations = 3 * batch.scored_segments.back() * row;
  if (options_.keep_direction) head.activations += batch.scored_segments[1] * kIndex;  // row scores
  return head;
}

void Estimator::add_batch(const PackedBatch& batch, const Walk& walk,
                          MemoryEstimate& estimate) const {
  const int64_t x = batch.size() * model_.width() * kernels_.element;  // a block's input or output
  const int64_t scored = batch.scored_segments.back() * model_.width() * kernels_.element;
  const bool scores = options_.keep_direction;
  const int64_t rest = batch_bytes(batch, dropout_) + model_.table_bytes(batch) +
                       (scores ? batch.segments[1] * kIndex : 0);
  const int64_t blocks = model_.blocks();
  const int64_t lowest = std::max<int64_t>(0, model_.lowest_trainable_block());
  const BlockMemory block = model_.block_memory(batch, kernels_);
  const int64_t backward = scores ? block.scored : block.backward;
  const bool again = options_.recompute == Recompute::block;
  int64_t reference = 0;
  for (size_t k = 0; k < options_.losses.size(); ++k) {
    if (options_.losses[k] == Loss::kl)
      reference += rows_of(batch, k) * model_.width() * kernels_.element;
  }
  auto moment = [&](int64_t windows, int64_t activations, int64_t logits, std::string name) {
    Memory now = persistent_;
    now.buffers = walk.buffers() + windows;
    now.activations = rest + activations;
    now.logits = logits;
    now.reference = reference;
    estimate.join({now, now, std::move(name)});
  };
  // Held of the first n blocks: inputs, and unless they are recomputed what their backward needs.
  auto held = [&](int64_t n) {
    return std::max<int64_t>(0, n - lowest) * (x + (again ? 0 : block.kept));
  };
  const int64_t own_input = blocks > lowest ? 0 : x;  // a block that keeps nothing still has one
  moment(0, held(blocks - 1) + (own_input ? own_input : x) + block.forward, 0,
         fmt::format("forward of block {}", blocks - 1));
  const Memory head = work_of_head(batch);
  moment(0, held(blocks) + x + head.activations, head.logits, "head");
  const int64_t norm_scores =
      scores ? batch.scored_segments[1] * model_.width() * kernels_.element : 0;
  moment(0, held(blocks) + 2 * x + head.activations + scored + norm_scores, 0,
         "backward of the last norm");
  for (int64_t b = blocks - 1; b >= lowest; --b) {
    const int64_t windows = walk.windows_at_block()[static_cast<size_t>(b)];
    const std::string name = fmt::format("backward of block {}", b);
    if (again) moment(windows, held(b + 1) + x + block.forward, 0, name + ", recomputed");
    moment(windows, held(b + 1) + (again ? block.kept : 0) + x + backward, 0, name);
    moment(walk.windows_behind_block()[static_cast<size_t>(b)], held(b) + x, 0,
           fmt::format("reductions of block {}", b));
  }
  moment(walk.windows_at_end(), 0, 0, "last reductions");
  moment(walk.windows_after(), 0, 0, "reductions after the backward");
}

MemoryEstimate Estimator::reference_pass(const PackedBatch& batch) const {
  Memory now = persistent_;
  now.buffers = reference_buffers_;
  now.activations = batch_bytes(batch, false) + model_.table_bytes(batch) +
                    batch.size() * model_.width() * kernels_.element +
                    model_.block_memory(batch, kernels_).forward;
  return {now, now, "reference's forward pass"};
}

// Probe::run_likelihood: the forward pass, then the head over the hidden states of its rows.
MemoryEstimate Estimator::probe_pass(const PackedBatch& batch) const {
  const int64_t rows = batch.scored_segments.back();
  const int64_t hidden = rows * model_.width() * kernels_.element;
  MemoryEstimate forward = reference_pass(batch);
  Memory now = forward.at_peak;
  now.buffers = walks_.back().buffers();
  now.reference = hidden;
  forward = {now, now, "a probe's forward pass"};
  now.activations = batch_bytes(batch, false) + model_.table_bytes(batch) + hidden;
  now.logits =
      kernels_.logits(std::min(kernels_.head_chunk(), rows), model_.vocab_size(), /*kl=*/true);
  forward.join({now, now, "a probe's head"});
  return forward;
}

int64_t Estimator::checkpoint_bytes(bool one_more) const {
  int64_t elements = 0;
  for (const UnitSize& unit : units_) elements += unit.trainable.shard;
  return (one_more ? 4 : 3) * kFloat * elements;
}

double Estimator::flops(const PackedBatch& batch) const {
  const Flops flops = model_.flops(batch);
  double sum = flops.total() + (options_.keep_direction ? flops.scores : 0.0);
  for (size_t k = 0; k < options_.losses.size(); ++k) {
    if (options_.losses[k] == Loss::kl)
      sum += 2.0 * static_cast<double>(rows_of(batch, k) * model_.head().numel());
  }
  return sum;
}

double Estimator::executed_flops(const PackedBatch& batch) const {
  if (options_.recompute == Recompute::none) return flops(batch);
  const double head = 2.0 * static_cast<double>(batch.scored_segments.back()) *
                      static_cast<double>(model_.head().numel());
  const auto blocks = static_cast<double>(model_.blocks());
  const auto lowest = static_cast<double>(std::max<int64_t>(0, model_.lowest_trainable_block()));
  return flops(batch) + (model_.flops(batch).forward - head) * (blocks - lowest) / blocks;
}

}  // namespace safegrad::dist
