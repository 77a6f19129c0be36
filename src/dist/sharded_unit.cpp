#include "dist/sharded_unit.h"

#include <algorithm>
#include <bit>
#include <functional>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/ranges.h>

#include "core/error.h"
#include "core/random.h"

namespace safegrad::dist {
namespace {

std::vector<Parameter*> select(const Unit& unit, bool trainable) {
  std::vector<Parameter*> chosen;
  for (Parameter* p : unit.parameters) {
    if (p->trainable == trainable) chosen.push_back(p);
  }
  return chosen;
}

size_t index_of(const std::string& block, const std::vector<std::string>& blocks) {
  return static_cast<size_t>(std::find(blocks.begin(), blocks.end(), block) - blocks.begin());
}

uint64_t hash_name(const std::string& name) {
  uint64_t h = 0;
  for (char c : name) h = mix64(h, static_cast<unsigned char>(c));
  return h;
}

}  // namespace

FlatGroup::FlatGroup(std::vector<Parameter*> parameters, int rank, int ranks)
    : parameters_(std::move(parameters)), rank_(rank), ranks_(ranks) {
  for (const Parameter* p : parameters_) {
    offsets_.push_back(used_);
    used_ += p->numel();
  }
  // Neighbours' shards may lie side by side, and both are written: they share no cache line
  // (float32).
  constexpr int64_t kLine = 16;
  shard_numel_ = (used_ + ranks * kLine - 1) / (ranks * kLine) * kLine;
  const int64_t shard_begin = rank * shard_numel_, shard_end = shard_begin + shard_numel_;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const int64_t begin = std::max(offsets_[i], shard_begin);
    const int64_t end = std::min(offsets_[i] + parameters_[i]->numel(), shard_end);
    if (begin >= end) continue;
    overlaps_.push_back(
        {parameters_[i], begin - offsets_[i], end - offsets_[i], begin - shard_begin});
  }
}

std::pair<int64_t, int64_t> FlatGroup::held() const {
  const int64_t begin = std::min(rank_ * shard_numel_, used_);
  return {begin, std::min(begin + shard_numel_, used_)};
}

void FlatGroup::view_values(const at::Tensor& full) const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter& p = *parameters_[i];
    p.value = full.defined() ? full.narrow(0, offsets_[i], p.numel()).view(p.shape) : at::Tensor();
  }
}

void FlatGroup::view_gradients(size_t k, const at::Tensor& full) const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter& p = *parameters_[i];
    if (p.grads.size() <= k) {
      p.grads.resize(k + 1);
      p.fresh.resize(k + 1, false);
    }
    p.grads[k] =
        full.defined() ? full.narrow(0, offsets_[i], p.numel()).view(p.shape) : at::Tensor();
  }
}

void FlatGroup::zero_padding(at::Tensor& full) const {
  if (numel() > used_) full.narrow(0, used_, numel() - used_).zero_();
}

ShardedUnit::ShardedUnit(const Unit& unit, size_t objectives, const ShardingOptions& options,
                         Mesh& mesh, Buffers& buffers)
    : unit_(unit),
      options_(options),
      mesh_(mesh),
      buffers_(buffers),
      trainable_{FlatGroup(select(unit, true), mesh.shard_group().rank(), mesh.shards()),
                 mesh.shards() > 1,
                 {},
                 {},
                 {}},
      frozen_{options.replicate_frozen
                  ? FlatGroup(select(unit, false), 0, 1)
                  : FlatGroup(select(unit, false), mesh.shard_group().rank(), mesh.shards()),
              mesh.shards() > 1 && !options.replicate_frozen,
              {},
              {},
              {}},
      accumulated_(objectives),
      gradient_full_(objectives) {
  if (trains()) {
    allocate(trainable_);
    const auto floats = at::TensorOptions().dtype(at::kFloat).device(options.device);
    const at::IntArrayRef size = trainable_.memory.own.sizes();
    const bool same_dtype = options.compute_dtype == at::kFloat;
    state_ = {same_dtype ? trainable_.memory.own : at::zeros(size, floats), at::zeros(size, floats),
              at::zeros(size, floats), trainable_.memory.own};
    for (at::Tensor& a : accumulated_) a = at::zeros(size, floats);
    find_segments();
    find_update_ranges();
  }
  if (!frozen_.group.empty()) allocate(frozen_);
}

void ShardedUnit::allocate(Part& part) {
  const int64_t n = part.group.shard_numel();
  if (part.sharded) {
    part.memory = mesh_.shard_group().allocate_shards(n, options_.compute_dtype);
  } else {
    part.memory.own = part.memory.all =
        at::zeros({n}, at::TensorOptions().dtype(options_.compute_dtype).device(options_.device));
  }
}

// A shard ends anywhere in a block.
void ShardedUnit::find_segments() {
  for (const FlatGroup::Overlap& o : trainable_.group.overlaps()) {
    const int64_t end = o.offset + (o.end - o.begin);
    if (!segments_.empty() && segments_.back().block == o.parameter->block) {
      segments_.back().end = end;
    } else {
      segments_.push_back({o.parameter->block, o.offset, end});
    }
  }
}

// Vectors (norms, biases) take no weight decay; neighbours that are treated alike are one range.
void ShardedUnit::find_update_ranges() {
  for (const FlatGroup::Overlap& o : trainable_.group.overlaps()) {
    const UpdateRange range{o.offset, o.offset + (o.end - o.begin), o.parameter->shape.size() > 1};
    if (!update_ranges_.empty() && update_ranges_.back().end == range.begin &&
        update_ranges_.back().decays == range.decays) {
      update_ranges_.back().end = range.end;
    } else {
      update_ranges_.push_back(range);
    }
  }
}

void ShardedUnit::load(const WeightSource& weights) {
  // Read on the host in float32: into the shard itself where it is that, else by way of a copy.
  auto read = [&](const FlatGroup& group, at::Tensor& destination) {
    const bool direct = destination.device().is_cpu() && destination.scalar_type() == at::kFloat;
    at::Tensor staging = direct ? destination : at::zeros({group.shard_numel()}, at::kFloat);
    for (const FlatGroup::Overlap& o : group.overlaps()) {
      // A parameter's pieces are whole rows, one below the other.
      const int64_t row = o.parameter->numel() / o.parameter->shape[0];
      for (const Piece& piece : o.parameter->pieces) {
        const int64_t first = piece.row * row, last = first + piece.rows * row;
        const int64_t begin = std::max(o.begin, first), end = std::min(o.end, last);
        if (begin >= end) continue;
        weights.read(piece.name, begin - first, end - first,
                     staging.data_ptr<float>() + o.offset + (begin - o.begin));
      }
    }
    if (!direct) destination.copy_(staging);
  };
  if (trains()) {
    read(trainable_.group, state_.master);
    follow_master();
  }
  if (!frozen_.group.empty()) read(frozen_.group, frozen_.memory.own);
}

ShardedUnit::State ShardedUnit::state() const {
  const auto [begin, end] = trainable_.group.held();
  auto held = [n = end - begin](const at::Tensor& t) { return t.narrow(0, 0, n); };
  return {
      begin, end, trainable_.group.used(), {held(state_.master), held(state_.m), held(state_.v)}};
}

std::string ShardedUnit::trained() const {
  std::string text;
  for (const Parameter* p : trainable_.group.parameters())
    text += fmt::format("{}{} [{}]", text.empty() ? "" : ", ", p->name, fmt::join(p->shape, ", "));
  return text;
}

void ShardedUnit::follow_master() {
  if (trains() && !state_.compute.is_same(state_.master)) state_.compute.copy_(state_.master);
}

void ShardedUnit::set_frozen(const at::Tensor& shard) {
  frozen_.memory.own.copy_(shard);
}

uint64_t ShardedUnit::fingerprint() const {
  uint64_t sum = 0;
  auto add = [&](const FlatGroup& group, const at::Tensor& values) {
    for (const FlatGroup::Overlap& o : group.overlaps()) {
      const uint64_t seed = hash_name(o.parameter->name);
      const at::Tensor slice = values.narrow(0, o.offset, o.end - o.begin).to(at::kCPU, at::kFloat);
      const float* x = slice.const_data_ptr<float>();
      sum += at::parallel_reduce(
          int64_t{0}, o.end - o.begin, 1 << 16, uint64_t{0},
          [&](int64_t begin, int64_t end, uint64_t part) {
            for (int64_t i = begin; i < end; ++i)
              part +=
                  mix64(seed + static_cast<uint64_t>(o.begin + i), std::bit_cast<uint32_t>(x[i]));
            return part;
          },
          std::plus<>());
    }
  };
  if (trains()) add(trainable_.group, state_.master);
  // Replicated weights are on every rank: the first one speaks for all.
  const bool speaks = frozen_.sharded || mesh_.shard_group().rank() == 0;
  if (!frozen_.group.empty() && speaks) add(frozen_.group, frozen_.memory.own);
  return sum;
}

void ShardedUnit::start_gather(Part& part) {
  if (part.group.empty()) return;
  part.full = part.memory.all.defined()
                  ? part.memory.all
                  : buffers_.gather_outputs.take(part.group.numel(), options_.compute_dtype);
  if (!part.sharded) return;
  mesh_.shard_group().about(unit_.name);
  part.work = mesh_.shard_group().all_gather(part.full, part.memory.own);
}

void ShardedUnit::start_gather() {
  if (gathered_ || gathering_) return;
  start_gather(trainable_);
  start_gather(frozen_);
  gathering_ = true;
}

void ShardedUnit::finish_gather() {
  if (gathered_) return;
  start_gather();
  for (Part* part : {&trainable_, &frozen_}) {
    if (part->work) part->work->wait();
    part->work.reset();
    if (!part->group.empty()) part->group.view_values(part->full);
  }
  gathered_ = true;
  gathering_ = false;
}

void ShardedUnit::release(Part& part) {
  if (part.group.empty()) return;
  part.group.view_values({});
  if (!part.memory.all.defined()) buffers_.gather_outputs.give_back(std::move(part.full));
  part.full = at::Tensor();
}

void ShardedUnit::release() {
  if (!gathered_) return;
  release(trainable_);
  release(frozen_);
  gathered_ = false;
}

// With one shard in the master's own dtype, layers write straight into the accumulators.
bool ShardedUnit::lends_accumulators() const {
  return !trainable_.sharded && options_.compute_dtype == at::kFloat;
}

// Layers write where the reduction reads, unless it needs another dtype.
BufferPool& ShardedUnit::gradient_buffers() {
  return options_.compute_dtype == options_.reduce_dtype ? buffers_.reduce_inputs : buffers_.own;
}

void ShardedUnit::lend_gradients(const std::vector<size_t>& active, bool first) {
  if (!trains()) return;
  for (size_t k : active) {
    if (gradient_full_[k].defined()) continue;  // a resident unit keeps adding until the step ends
    active_.push_back(k);
    first_ = first;
    gradient_full_[k] = lends_accumulators() ? accumulated_[k]
                                             : gradient_buffers().take(trainable_.group.numel(),
                                                                       options_.compute_dtype);
    trainable_.group.zero_padding(gradient_full_[k]);
    trainable_.group.view_gradients(k, gradient_full_[k]);
    for (Parameter* p : trainable_.group.parameters()) p->fresh[k] = !lends_accumulators() || first;
  }
}

void ShardedUnit::start_reduce() {
  if (!trains()) return;
  mesh_.shard_group().about(unit_.name);
  for (Parameter* p : trainable_.group.parameters()) p->settle();
  for (size_t k : active_) {
    trainable_.group.view_gradients(k, {});
    at::Tensor buffer = std::move(gradient_full_[k]);
    gradient_full_[k] = at::Tensor();
    if (lends_accumulators()) continue;
    if (buffer.scalar_type() != options_.reduce_dtype) {
      at::Tensor converted = buffers_.reduce_inputs.take(buffer.numel(), options_.reduce_dtype);
      converted.copy_(buffer);
      gradient_buffers().give_back(std::move(buffer));
      buffer = std::move(converted);
    }
    Reduction reduction{k, std::move(buffer), {}, {}};
    const bool direct = first_ && options_.reduce_dtype == at::kFloat;
    reduction.output =
        direct ? accumulated_[k]
               : buffers_.own.take(trainable_.group.shard_numel(), options_.reduce_dtype);
    reduction.work = mesh_.shard_group().reduce_scatter(reduction.output, reduction.input);
    reductions_.push_back(std::move(reduction));
  }
  active_.clear();
}

void ShardedUnit::finish_reduce() {
  for (Reduction& r : reductions_) {
    r.work->wait();
    buffers_.reduce_inputs.give_back(std::move(r.input));
    at::Tensor& sum = accumulated_[r.objective];
    if (r.output.is_same(sum)) continue;
    if (first_) {
      sum.copy_(r.output);
    } else {
      sum.add_(r.output);
    }
    buffers_.own.give_back(std::move(r.output));
  }
  reductions_.clear();
}

void ShardedUnit::reduce_replicas(const std::vector<size_t>& objectives) {
  if (!trains() || mesh_.replicas() == 1) return;
  mesh_.replica_group().about(unit_.name);
  for (size_t k : objectives) mesh_.replica_group().all_reduce(accumulated_[k]);
}

void ShardedUnit::set_anchor() {
  if (!trains()) return;
  if (!anchor_.defined()) anchor_ = at::empty_like(state_.m);
  anchor_.copy_(state_.master);
}

void ShardedUnit::measure_drift(size_t k) {
  if (trains()) at::sub_out(accumulated_[k], state_.master, anchor_);
}

void ShardedUnit::add_inner_products(const Kernels& kernels, const std::vector<std::string>& blocks,
                                     const at::Tensor& grams) const {
  for (const Segment& segment : segments_) {
    const auto row = static_cast<int64_t>(index_of(segment.block, blocks));
    std::vector<at::Tensor> gradients;
    for (const at::Tensor& a : accumulated_)
      gradients.push_back(a.narrow(0, segment.begin, segment.end - segment.begin));
    kernels.add_inner_products(gradients, grams.select(0, row));
  }
}

std::vector<UpdateRange> ShardedUnit::update_ranges(int64_t begin, int64_t end) const {
  std::vector<UpdateRange> ranges;
  for (const UpdateRange& range : update_ranges_) {
    const UpdateRange part{std::max(range.begin, begin), std::min(range.end, end), range.decays};
    if (part.begin < part.end) ranges.push_back(part);
  }
  return ranges;
}

void ShardedUnit::update(const Kernels& kernels, const std::vector<std::string>& blocks,
                         const std::vector<std::vector<double>>& coefficients, const AdamW& adamw) {
  for (size_t first = 0; first < segments_.size();) {
    const std::vector<double>& own = coefficients[index_of(segments_[first].block, blocks)];
    size_t last = first + 1;
    while (last < segments_.size() && coefficients[index_of(segments_[last].block, blocks)] == own)
      ++last;
    kernels.update(accumulated_, own, adamw,
                   update_ranges(segments_[first].begin, segments_[last - 1].end), state_);
    first = last;
  }
}

}  // namespace safegrad::dist
