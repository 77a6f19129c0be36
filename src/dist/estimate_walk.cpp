#include "dist/estimate_walk.h"

#include <algorithm>
#include <set>

#include "dist/message_sizes.h"

namespace safegrad::dist {
namespace {

constexpr int64_t kFloat = 4;

PartSize part_size(const Unit& unit, bool trainable, int64_t shards) {
  std::vector<Parameter*> chosen;
  for (Parameter* p : unit.parameters) {
    if (p->trainable == trainable) chosen.push_back(p);
  }
  const FlatGroup group(std::move(chosen), 0, static_cast<int>(shards));
  return {group.numel(), group.shard_numel(), shards > 1};
}

}  // namespace

UnitSize size_of(const Unit& unit, const Layout& layout, bool replicate_frozen) {
  return {part_size(unit, true, layout.shards),
          part_size(unit, false, replicate_frozen ? 1 : layout.shards), unit.resident};
}

void PoolSize::take(int64_t numel, int64_t element) {
  int64_t& free = free_[{numel, element}];
  if (free > 0) {
    --free;
  } else {
    bytes_ += numel * element;
  }
}

void PoolSize::give_back(int64_t numel, int64_t element) {
  ++free_[{numel, element}];
}

Walk::Walk(const CausalLM& model, const EngineOptions& options, const Layout& layout,
           std::vector<UnitSize> units, bool reference_head)
    : model_(model),
      options_(options),
      layout_(layout),
      units_(std::move(units)),
      without_directions_(units_.size()),
      reference_head_(reference_head),
      compute_(static_cast<int64_t>(c10::elementSize(options.sharding.compute_dtype))),
      reduce_(static_cast<int64_t>(c10::elementSize(options.sharding.reduce_dtype))),
      at_block_(static_cast<size_t>(model.blocks()), 0),
      behind_block_(at_block_) {
  for (size_t u = 0; options.keep_direction && u < model.units().size(); ++u) {
    if (units_[u].trainable.full == 0) continue;
    directions_[u] = units_.size();
    units_.push_back({{}, units_[u].trainable, units_[u].resident});
  }
  states_.resize(units_.size());
}

bool Walk::scores(const std::vector<size_t>& active) const {
  return options_.keep_direction && std::find(active.begin(), active.end(), 0) != active.end();
}

void Walk::step(int64_t micro_batches, const std::vector<std::vector<size_t>>& passes) {
  const bool scored = std::any_of(passes.begin(), passes.end(),
                                  [this](const auto& active) { return scores(active); });
  const size_t gathered = scored ? units_.size() : without_directions_;
  for (size_t u = 0; u < gathered; ++u) {
    if (units_[u].resident) finish_gather(u);
  }
  for (int64_t m = 0; m < micro_batches; ++m) {
    for (const std::vector<size_t>& active : passes) pass(active, m == 0);
  }
  for (size_t u = 0; u < units_.size(); ++u) {
    if (!units_[u].resident) continue;
    start_reduce(u);
    after_ = std::max(after_, windows_);
    finish_reduce(u);
    release(u);
  }
  std::set<size_t> computed;
  for (const std::vector<size_t>& active : passes) computed.insert(active.begin(), active.end());
  reduce_replicas(static_cast<int64_t>(computed.size()));
}

// As Engine's functions of these names.
std::vector<size_t> Walk::group_of(const std::vector<size_t>& units, bool directions) const {
  std::vector<size_t> group;
  for (size_t u : units) {
    group.push_back(u);
    if (directions && directions_.contains(u)) group.push_back(directions_.at(u));
  }
  return group;
}

std::vector<size_t> Walk::head_group(bool scores) const {
  std::vector<size_t> group = group_of(model_.head_units(), scores);
  if (reference_head_) group.push_back(without_directions_ - 1);
  return group;
}

std::vector<size_t> Walk::gather_order(const std::vector<size_t>& head, bool scores) const {
  std::vector<size_t> order = {model_.embedding_unit()};
  for (int64_t b = 0; b < model_.blocks(); ++b) order.push_back(model_.block_unit(b));
  order.insert(order.end(), head.begin(), head.end());
  const int64_t lowest = model_.lowest_trainable_block();
  for (int64_t b = model_.blocks() - 1; b >= std::max<int64_t>(0, lowest); --b) {
    for (size_t u : group_of({model_.block_unit(b)}, scores)) order.push_back(u);
  }
  if (scores && lowest < 0) order.push_back(directions_.at(model_.embedding_unit()));
  return order;
}

void Walk::pass(const std::vector<size_t>& active, bool first) {
  const bool scored = scores(active);
  const std::vector<size_t> head = head_group(scored), order = gather_order(head, scored);
  size_t started = 0, used = 0;
  auto start_next = [&] {
    if (started < order.size()) start_gather(order[started++]);
  };
  auto next = [&](size_t count) {
    while (started < used + count) start_next();
    for (size_t i = 0; i < count; ++i) finish_gather(order[used++]);
    start_next();
  };
  start_next();
  if (model_.adapter_unit() >= 0) lend(static_cast<size_t>(model_.adapter_unit()), active, first);
  for (int64_t forward = 0; forward <= model_.blocks(); ++forward) {  // the embedding, the blocks
    next(1);
    release(order[used - 1]);
  }
  next(head.size());
  for (size_t u : model_.head_units()) lend(u, active, first);
  for (size_t u : head) release(u);

  size_t reducing = units_.size();  // none
  const int64_t lowest = model_.lowest_trainable_block();
  for (int64_t b = model_.blocks() - 1; b >= std::max<int64_t>(0, lowest); --b) {
    const size_t unit = model_.block_unit(b);
    const std::vector<size_t> group = group_of({unit}, scored);
    next(group.size());
    lend(unit, active, first);
    int64_t& during = at_block_[static_cast<size_t>(b)];
    during = std::max(during, windows_);
    for (size_t u : group) release(u);
    start_reduce(unit);
    int64_t& behind = behind_block_[static_cast<size_t>(b)];
    behind = std::max(behind, windows_);
    if (reducing < units_.size()) finish_reduce(reducing);
    reducing = unit;
  }
  const size_t embedding = model_.embedding_unit();
  if (lowest < 0) lend(embedding, active, first);
  if (lowest < 0 && scored) {
    next(1);
    release(order[used - 1]);
  }
  std::vector<size_t> last = model_.head_units();
  const bool separate = std::find(last.begin(), last.end(), embedding) == last.end();
  for (size_t u : last) start_reduce(u);
  at_end_ = std::max(at_end_, windows_);
  if (reducing < units_.size()) finish_reduce(reducing);
  for (size_t u : last) finish_reduce(u);
  if (!separate) return;
  start_reduce(embedding);
  at_end_ = std::max(at_end_, windows_);
  finish_reduce(embedding);
}

void Walk::count(const char* name, int64_t bytes) {
  Traffic& t = traffic_[name];
  t.calls += 1;
  t.bytes += bytes;
}

void Walk::start_gather(size_t u) {
  State& state = states_[u];
  if (state.gathered || state.gathering) return;
  for (const PartSize* part : {&units_[u].trainable, &units_[u].frozen}) {
    if (part->full == 0 || !part->sharded) continue;
    if (layout_.transport != Transport::shared_memory) gathers_.take(part->full, compute_);
    count("all_gather", (layout_.shards - 1) * part->shard * compute_);
  }
  state.gathering = true;
}

void Walk::finish_gather(size_t u) {
  start_gather(u);
  states_[u].gathered = true;
  states_[u].gathering = false;
}

void Walk::release(size_t u) {
  if (!states_[u].gathered) return;
  for (const PartSize* part : {&units_[u].trainable, &units_[u].frozen}) {
    if (part->full == 0 || !part->sharded || layout_.transport == Transport::shared_memory)
      continue;
    gathers_.give_back(part->full, compute_);
  }
  states_[u].gathered = false;
}

bool Walk::lends_accumulators(size_t u) const {
  return !units_[u].trainable.sharded && compute_ == kFloat;
}

bool Walk::reduces_directly(size_t u) const {
  return states_[u].first && reduce_ == kFloat;
}

PoolSize& Walk::gradient_buffers() {
  return compute_ == reduce_ ? reduce_inputs_ : own_;
}

int64_t Walk::window(int64_t ranks, int64_t shard, int64_t element) const {
  if (layout_.transport != Transport::messages || ranks == 1 || shard == 0) return 0;
  return ReceiveWindow(ranks, shard, element).numel * element;
}

void Walk::lend(size_t u, const std::vector<size_t>& active, bool first) {
  if (units_[u].trainable.full == 0) return;
  State& state = states_[u];
  for (size_t k : active) {
    if (std::find(state.lent.begin(), state.lent.end(), k) != state.lent.end()) continue;
    state.lent.push_back(k);
    state.first = first;
    if (!lends_accumulators(u)) gradient_buffers().take(units_[u].trainable.full, compute_);
  }
}

void Walk::start_reduce(size_t u) {
  const PartSize& part = units_[u].trainable;
  State& state = states_[u];
  if (part.full == 0) return;
  for (size_t k : state.lent) {
    if (lends_accumulators(u)) continue;
    if (compute_ != reduce_) {
      reduce_inputs_.take(part.full, reduce_);
      gradient_buffers().give_back(part.full, compute_);
    }
    if (!reduces_directly(u)) own_.take(part.shard, reduce_);
    windows_ += window(layout_.shards, part.shard, reduce_);
    count("reduce_scatter", (layout_.shards - 1) * part.shard * reduce_);
    state.reducing.push_back(k);
  }
  state.lent.clear();
}

void Walk::finish_reduce(size_t u) {
  const PartSize& part = units_[u].trainable;
  for (size_t i = 0; i < states_[u].reducing.size(); ++i) {
    reduce_inputs_.give_back(part.full, reduce_);
    if (!reduces_directly(u)) own_.give_back(part.shard, reduce_);
    windows_ -= window(layout_.shards, part.shard, reduce_);
  }
  states_[u].reducing.clear();
}

// MpiCommunicator::all_reduce: a padded copy, its shard, and the window of a reduce-scatter.
void Walk::reduce_replicas(int64_t objectives) {
  const int64_t replicas = layout_.replicas();
  if (replicas == 1) return;
  for (const UnitSize& unit : units_) {
    const int64_t numel = unit.trainable.shard;
    if (numel == 0) continue;
    for (int64_t k = 0; k < objectives; ++k)
      count("all_reduce", 2 * (replicas - 1) * numel * kFloat / replicas);
    if (layout_.transport == Transport::nccl) continue;
    const int64_t n = (numel + replicas - 1) / replicas;
    const int64_t padded = n * replicas == numel ? 0 : n * replicas;
    const int64_t received = ReceiveWindow(replicas, n, kFloat).numel;
    after_ = std::max(after_, (padded + n + received) * kFloat);
  }
}

}  // namespace safegrad::dist
