// kernel_memory.h: what the kernels of a kind of device allocate, for estimates that run none of
// them.
#pragma once
#include <cstdint>

#include "core/kernels.h"
#include "core/packed_batch.h"

namespace safegrad {

/// Scored positions whose logits exist at a time. 256 rows of a 49,152-word vocabulary are 50 MB
/// and make the products large enough for a CPU; 1024 rows of a 128,256-word vocabulary are 263 MB
/// in bfloat16 and fill a card.
inline constexpr int64_t kCpuHeadChunk = 256, kGpuHeadChunk = 1024;

/// Bytes that attention allocates beside its input and output.
struct AttentionMemory {
  int64_t saved = 0;     ///< from forward to backward
  int64_t forward = 0;   ///< most at a time during the forward, besides `saved`
  int64_t backward = 0;  ///< the same of the backward
};

/// A kind of device, its activations of `element` bytes each (4: float32, 2: bfloat16).
struct KernelMemory {
  bool gpu = false;
  int64_t element = 4;
  int64_t threads = 1;  ///< of a CPU: each has a workspace of attention's

  int64_t head_chunk() const { return gpu ? kGpuHeadChunk : kCpuHeadChunk; }
  /// Most bytes of logits [n, V] at a time while a chunk of n rows is scored and its gradient
  /// multiplied; `kl`: with the reference's.
  int64_t logits(int64_t n, int64_t vocab, bool kl) const;
  /// Of a batch whose tensors may be undefined: its sequences count.
  AttentionMemory attention(const AttentionShape& shape, const PackedBatch& batch) const;
};

}  // namespace safegrad
