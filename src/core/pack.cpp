#include "core/pack.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "core/error.h"
#include "core/random.h"

namespace safegrad {
namespace {

at::Tensor to_tensor(const std::vector<int64_t>& values) {
  return at::tensor(at::ArrayRef<int64_t>(values), at::kLong);
}

// Grows a batch token by token; finish() turns the lists into tensors.
struct Builder {
  PackedBatch batch;
  std::vector<int64_t> tokens, positions, scored, targets, dropout_keys;

  Builder() {
    batch.cu_seqlens = {0};
    batch.segments = {0};
    batch.scored_segments = {0};
  }

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
  void push(int64_t token, int64_t position) {
    tokens.push_back(token);
    positions.push_back(position);
    batch.positions_end = std::max(batch.positions_end, position + 1);
  }
  void score(int64_t row, int64_t target) {
    scored.push_back(row);
    targets.push_back(target);
  }
  void end_sequence() {
    batch.longest = std::max(batch.longest, size() - batch.cu_seqlens.back());
    batch.cu_seqlens.push_back(size());
  }
  void end_objective() {
    batch.segments.push_back(size());
    batch.scored_segments.push_back(static_cast<int64_t>(scored.size()));
  }
  PackedBatch finish() {
    batch.tokens = to_tensor(tokens);
    batch.positions = to_tensor(positions);
    batch.scored = to_tensor(scored);
    batch.targets = to_tensor(targets);
    batch.boundaries = to_tensor(batch.cu_seqlens).to(at::kInt);
    return std::move(batch);
  }
};

void push_sample(Builder& builder, const ObjectiveData& data, int64_t sample) {
  const auto tokens = data.file->tokens(sample);
  const auto mask = data.file->mask(sample);
  const int64_t begin = builder.size();
  for (size_t t = 0; t < tokens.size(); ++t) {
    const bool last = t + 1 == tokens.size();
    builder.push(tokens[t], static_cast<int64_t>(t));
    // The last position has no next token: it counts in the KL over all positions alone, which
    // needs no target.
    if (data.all_positions || (!last && mask[t + 1])) {
      builder.score(begin + static_cast<int64_t>(t), last ? 0 : tokens[t + 1]);
    }
  }
  builder.end_sequence();
}

int64_t prompt_length(const TokenFile& file, int64_t sequence) {
  const auto mask = file.mask(sequence);
  size_t n = 0;
  while (!mask[n]) ++n;
  return static_cast<int64_t>(n);
}

}  // namespace

PackedBatch upload(PackedBatch batch, const Backend& backend) {
  for (at::Tensor* tensor :
       {&batch.tokens, &batch.positions, &batch.boundaries, &batch.dropout_keys, &batch.scored,
        &batch.targets, &batch.reference_hidden}) {
    if (tensor->defined()) *tensor = backend.upload(*tensor);
  }
  return batch;
}

void add_row_scores(const PackedBatch& batch, const at::Tensor& row_scores) {
  at::Tensor(batch.token_scores)
      .index_add_(0, batch.scored.narrow(0, 0, row_scores.size(0)), row_scores);
}

int64_t scored_rows(const ObjectiveData& data, int64_t i) {
  return data.all_positions ? data.file->length(i) : data.file->scored(i);
}

PackedBatch outline(const std::vector<Draw>& draws, const std::vector<Stream>& streams,
                    const std::vector<size_t>& active) {
  PackedBatch batch;
  batch.cu_seqlens = batch.segments = batch.scored_segments = {0};
  for (size_t k = 0; k < streams.size(); ++k) {
    int64_t scored = batch.scored_segments.back();
    const bool runs = std::find(active.begin(), active.end(), k) != active.end();
    for (const Draw& draw : draws) {
      if (!runs || draw.objective != k) continue;
      const int64_t length = streams[k].lengths[static_cast<size_t>(draw.sample)];
      batch.cu_seqlens.push_back(batch.cu_seqlens.back() + length);
      batch.longest = batch.positions_end = std::max(batch.longest, length);
      scored += streams[k].scored[static_cast<size_t>(draw.sample)];
    }
    batch.segments.push_back(batch.cu_seqlens.back());
    batch.scored_segments.push_back(scored);
  }
  return batch;
}

PackedBatch pack(const std::vector<Draw>& draws, const std::vector<ObjectiveData>& objectives,
                 const PackOptions& options) {
  Builder builder;
  std::vector<at::Tensor> references;
  size_t next = 0;
  for (size_t k = 0; k < objectives.size(); ++k) {
    for (; next < draws.size() && draws[next].objective == k; ++next) {
      const int64_t sample = draws[next].sample;
      push_sample(builder, objectives[k], sample);
      if (objectives[k].reference) references.push_back(objectives[k].reference(sample));
      if (!options.dropout) continue;
      const uint64_t key = mix64(mix64(options.seed, static_cast<uint64_t>(options.step)), k);
      builder.dropout_keys.resize(builder.tokens.size(),
                                  static_cast<int64_t>(mix64(key, static_cast<uint64_t>(sample))));
    }
    builder.end_objective();
  }
  SAFEGRAD_CHECK(next == draws.size(), UsageError,
                 "pack: draw {} of {} is of objective {}; draws must be sorted and below {}", next,
                 draws.size(), draws[next].objective, objectives.size());
  PackedBatch batch = builder.finish();
  if (options.dropout) batch.dropout_keys = to_tensor(builder.dropout_keys);
  if (!references.empty()) batch.reference_hidden = at::cat(references);
  return batch;
}

PackedChoices pack_choices(const std::vector<int64_t>& groups, const TokenFile& file,
                           const std::vector<std::vector<int64_t>>& members) {
  Builder builder;
  PackedChoices result;
  std::vector<int64_t> parents;
  for (int64_t group : groups) {
    const auto& candidates = members[static_cast<size_t>(group)];
    const int64_t prompt = prompt_length(file, candidates[0]);
    const int64_t begin = builder.size(), parent = static_cast<int64_t>(parents.size());
    const auto shared = file.tokens(candidates[0]);
    for (int64_t t = 0; t < prompt; ++t) builder.push(shared[static_cast<size_t>(t)], t);
    builder.end_sequence();
    parents.push_back(-1);
    for (int64_t candidate : candidates) {
      const auto tokens = file.tokens(candidate);
      int64_t row = begin + prompt - 1;
      for (int64_t t = prompt; t < static_cast<int64_t>(tokens.size()); ++t) {
        builder.score(row, tokens[static_cast<size_t>(t)]);
        result.candidates.push_back(candidate);
        if (t + 1 == static_cast<int64_t>(tokens.size())) break;
        row = builder.size();
        builder.push(tokens[static_cast<size_t>(t)], t);
      }
      if (static_cast<int64_t>(tokens.size()) == prompt + 1) continue;
      builder.end_sequence();
      parents.push_back(parent);
    }
  }
  builder.batch.parents = std::move(parents);
  builder.end_objective();
  result.batch = builder.finish();
  return result;
}

std::vector<int64_t> group_lengths(const TokenFile& file) {
  std::vector<int64_t> lengths(static_cast<size_t>(file.groups()), 0);
  for (int64_t i = 0; i < file.size(); ++i) {
    int64_t& length = lengths[static_cast<size_t>(file.group(i))];
    if (length == 0) length = prompt_length(file, i);
    length += file.scored(i) - 1;
  }
  return lengths;
}

}  // namespace safegrad
