// packed_batch.h: several sequences of several objectives as one run of tokens, without padding.
#pragma once
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace safegrad {

/// One micro-batch of one rank; its tensors are on the rank's device. T tokens in N sequences; the
/// sequences of objective k are the tokens [segments[k], segments[k+1]) and its scored rows are
/// [scored_segments[k], scored_segments[k+1]). Any of these may be empty: a rank without sequences
/// still takes part in every collective. An outline (core/pack.h) has no tensors.
struct PackedBatch {
  at::Tensor tokens;                ///< i64 [T]
  at::Tensor positions;             ///< i64 [T], position of each token in its sequence
  std::vector<int64_t> cu_seqlens;  ///< [N + 1] token boundaries of the sequences
  std::vector<int64_t>
      parents;  ///< [N] or empty; i >= 0: this sequence continues sequence i (probes only)
  std::vector<int64_t> segments;  ///< [K + 1]
  at::Tensor boundaries;          ///< i32 [N + 1] cu_seqlens where the tokens are
  int64_t longest = 0;            ///< tokens of the longest sequence
  int64_t positions_end = 0;      ///< largest position + 1
  at::Tensor dropout_keys;  ///< i64 [T] key of each token's sequence, or undefined: no dropout
  bool adapters = true;     ///< false: run the frozen base alone

  at::Tensor scored;   ///< i64 [S] rows whose next token is scored, ascending per objective
  at::Tensor targets;  ///< i64 [S] that next token
  std::vector<int64_t> scored_segments;  ///< [K + 1]
  /// f64 [tokens of objective 0] or undefined: layers add to it each token's part of ⟨weight
  /// gradient, Parameter::direction⟩.
  at::Tensor token_scores;
  at::Tensor
      reference_hidden;  ///< [rows of the KL objective, D] of the reference model, or undefined

  int64_t size() const { return cu_seqlens.empty() ? 0 : cu_seqlens.back(); }
  int64_t sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  size_t objectives() const { return segments.size() - 1; }
};

/// token_scores of the batch += those of objective 0's scored rows, f64 [rows].
void add_row_scores(const PackedBatch& batch, const at::Tensor& row_scores);

}  // namespace safegrad
