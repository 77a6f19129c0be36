#include "core/planner.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/error.h"
#include "core/random.h"

namespace safegrad {
namespace {

struct Item {
  Draw draw;
  int64_t tokens;
  double cost;
};

struct Bin {
  std::vector<Draw> draws;
  int64_t tokens = 0;
  double cost = 0;
};

// Longest first into the cheapest bin that has room. Returns false if some item found no room.
bool fill(const std::vector<Item>& items, int64_t max_tokens, std::vector<Bin>& bins) {
  for (const Item& item : items) {
    Bin* best = nullptr;
    for (Bin& bin : bins) {
      if (bin.tokens + item.tokens <= max_tokens && (!best || bin.cost < best->cost)) best = &bin;
    }
    if (!best) return false;
    best->draws.push_back(item.draw);
    best->tokens += item.tokens;
    best->cost += item.cost;
  }
  return true;
}

}  // namespace

std::vector<std::vector<int64_t>> samples_by_rank(const StepPlan& plan, size_t k) {
  std::vector<std::vector<int64_t>> samples(plan.assignment.front().size());
  for (const auto& micro_batch : plan.assignment) {
    for (size_t r = 0; r < samples.size(); ++r) {
      for (const Draw& draw : micro_batch[r]) {
        if (draw.objective == k) samples[r].push_back(draw.sample);
      }
    }
  }
  return samples;
}

std::vector<int64_t> epoch_order(int64_t n, uint64_t seed, size_t objective, int64_t epoch) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  const Philox random(mix64(mix64(seed, objective), static_cast<uint64_t>(epoch)));
  for (int64_t i = n - 1; i > 0; --i) {
    const auto bits = random(static_cast<uint64_t>(i), 0);
    const uint64_t word = (uint64_t{bits[0]} << 32) | bits[1];
    std::swap(order[static_cast<size_t>(i)], order[word % static_cast<uint64_t>(i + 1)]);
  }
  return order;
}

Planner::Planner(std::vector<Stream> streams, int64_t ranks, int64_t max_tokens, uint64_t seed,
                 int64_t total_task_samples, double scored_cost)
    : streams_(std::move(streams)),
      ranks_(ranks),
      max_tokens_(max_tokens),
      seed_(seed),
      total_task_samples_(total_task_samples),
      scored_cost_(scored_cost),
      epochs_(streams_.size()) {
  for (const Stream& stream : streams_) {
    const auto& lengths = stream.lengths;
    const auto longest = std::max_element(lengths.begin(), lengths.end());
    SAFEGRAD_CHECK(
        longest == lengths.end() || *longest <= max_tokens, DataError,
        "batch.max_tokens_per_rank is {}, but sequence {} of a data set has {} tokens: raise "
        "the budget or prepare the data with a smaller --max-length",
        max_tokens, longest - lengths.begin(), *longest);
  }
}

int64_t Planner::sample_at(size_t objective, int64_t position) const {
  const auto n = static_cast<int64_t>(streams_[objective].lengths.size());
  Epoch& epoch = epochs_[objective];
  if (epoch.number != position / n) {
    epoch = {position / n, epoch_order(n, seed_, objective, position / n)};
  }
  return epoch.order[static_cast<size_t>(position % n)];
}

std::vector<Draw> Planner::draws(int64_t step, bool all) const {
  std::vector<Draw> result;
  for (size_t k = 0; k < streams_.size(); ++k) {
    const Turns& turns = streams_[k].turns;
    if (!all && !turns.due(step)) continue;
    const int64_t turn = turns.before(step + 1) - 1;
    const int64_t begin = turn * streams_[k].per_step;
    int64_t end = begin + streams_[k].per_step;
    if (k == 0 && total_task_samples_ > 0) end = std::min(end, total_task_samples_);
    for (int64_t p = begin; p < end; ++p) result.push_back({k, sample_at(k, p)});
  }
  return result;
}

StepPlan Planner::plan(int64_t step, bool all, const std::vector<int64_t>& left_out) const {
  std::vector<Item> items;
  int64_t total = 0;
  for (const Draw& draw : draws(step, all)) {
    if (draw.objective == 0 && std::binary_search(left_out.begin(), left_out.end(), draw.sample))
      continue;
    const Stream& stream = streams_[draw.objective];
    const auto i = static_cast<size_t>(draw.sample);
    const double cost = static_cast<double>(stream.lengths[i]) +
                        scored_cost_ * static_cast<double>(stream.scored[i]);
    items.push_back({draw, stream.lengths[i], cost});
    total += stream.lengths[i];
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });

  std::vector<Bin> bins;
  int64_t micro_batches =
      std::max<int64_t>(1, (total + ranks_ * max_tokens_ - 1) / (ranks_ * max_tokens_));
  for (;; ++micro_batches) {
    bins.assign(static_cast<size_t>(micro_batches * ranks_), Bin{});
    if (fill(items, max_tokens_, bins)) break;
  }

  StepPlan plan;
  plan.assignment.resize(static_cast<size_t>(micro_batches));
  for (size_t b = 0; b < bins.size(); ++b) {
    auto& draws = bins[b].draws;
    std::stable_sort(draws.begin(), draws.end(),
                     [](const Draw& x, const Draw& y) { return x.objective < y.objective; });
    plan.assignment[b / static_cast<size_t>(ranks_)].push_back(std::move(draws));
  }
  return plan;
}

}  // namespace safegrad
