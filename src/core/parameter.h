// parameter.h: one weight matrix or vector as layers see it; its memory belongs to a sharded unit.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace safegrad {

/// A Hugging Face tensor inside a parameter: rows [row, row + rows) of it. q, k and v of a layer,
/// for example, are three pieces of one matrix, so that one GEMM serves all of them.
struct Piece {
  std::string name;
  int64_t row, rows;
};

/// A weight that layers read and write gradients of. It owns no memory: `value` is defined between
/// its unit's gather and release, `grads[k]` (gradient of objective k, summed over tokens) while
/// the unit lends its gradient buffers. Layers therefore keep references to parameters, never to
/// their tensors.
struct Parameter {
  std::string name;
  /// What its gradient is recorded under: "embedding", "block 3", "head". An adapter's is that of
  /// the block it acts in.
  std::string block;
  std::vector<int64_t> shape;  ///< [out, in] or [n]
  bool trainable = true;
  std::vector<Piece> pieces;  ///< rows in order, covering the parameter

  at::Tensor value;
  std::vector<at::Tensor> grads;
  std::vector<bool> fresh;  ///< grads[k] holds nothing yet: the first write overwrites
  /// Where tokens are scored (PackedBatch::token_scores): `value` of it is the direction that
  /// gradients are multiplied with. Else null.
  const Parameter* direction = nullptr;

  int64_t numel() const;

  /// True if objective k wants a gradient of this parameter now.
  bool wants(size_t k) const { return trainable && k < grads.size() && grads[k].defined(); }
  /// grads[k] += scale * dyᵀ x, for dy [T, out], x [T, in]: the weight gradient of y = x Wᵀ.
  void add_product(size_t k, const at::Tensor& dy, const at::Tensor& x, double scale = 1.0);
  /// grads[k] += g.
  void add(size_t k, const at::Tensor& g);
  /// grads[k], zeroed if nothing has been written to it: for what adds in other ways.
  at::Tensor& started(size_t k);
  /// Zeroes gradients that no token wrote to (an objective without tokens on this rank).
  void settle();
};

/// Parameters that are gathered, released and reduced together (design §3).
struct Unit {
  std::string name;
  std::vector<Parameter*> parameters;
  bool resident =
      false;  ///< stays gathered for a whole step (small units that every block reads: adapters)
};

/// The blocks of the units' parameters, each once, in the order in which they first occur.
std::vector<std::string> block_names(const std::vector<Unit>& units);

}  // namespace safegrad
