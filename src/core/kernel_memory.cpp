#include "core/kernel_memory.h"

#include <algorithm>

namespace safegrad {
namespace {

constexpr int64_t kFloat = 4;

// LibTorch 2.11's flash kernel for CPUs works on blocks of so many queries and keys; each thread
// has room for a block of scores in float32.
int64_t query_block(int64_t length) {
  return std::min<int64_t>(length, length >= 768 ? 256 : length >= 192 ? 64 : 32);
}
int64_t key_block(int64_t length) {
  return std::min<int64_t>(length, 512);
}

// A sequence of `length` tokens: keys and values repeated for the query heads of their group, the
// kernel's outputs in a layout of their own, its workspace.
AttentionMemory cpu_sequence(const KernelMemory& m, const AttentionShape& s, int64_t length) {
  const int64_t head = length * s.head_dim * m.element;  // of one head
  const int64_t repeated = s.heads > s.kv_heads ? 2 * s.heads * head : 0;
  const int64_t q = query_block(length), k = key_block(length);
  const int64_t reduced = m.element < kFloat ? q * k * m.element : 0;  // scores in the input's type
  const int64_t forward_space = m.threads * ((q * k + 2 * q + q * s.head_dim) * kFloat + reduced);
  const int64_t backward_space = m.threads * (2 * q * k * kFloat + 2 * reduced);
  const int64_t gradients = 3 * s.heads * head;
  return {length * s.heads * kFloat, repeated + s.heads * head + forward_space,
          repeated + gradients + std::max(backward_space, s.kv_heads * head)};
}

// All sequences in one kernel. bfloat16: FlashAttention's backward holds gradients of keys and
// values for every query head, of queries in float32, and a sum a row; float32: the
// memory-efficient kernel, keys and values repeated.
AttentionMemory gpu_batch(const KernelMemory& m, const AttentionShape& s, int64_t tokens) {
  const int64_t row = tokens * s.heads * s.head_dim, kv_row = tokens * s.kv_heads * s.head_dim;
  const int64_t lse = tokens * s.heads * kFloat;
  if (m.element < kFloat) {
    const int64_t gradients = (row + 2 * kv_row) * m.element, expanded = 2 * row * m.element;
    return {lse, 0, gradients + expanded + row * kFloat + lse};
  }
  const int64_t repeated = 2 * row * kFloat;
  return {lse, repeated, repeated + 3 * row * kFloat + kv_row * kFloat + lse};
}

}  // namespace

int64_t KernelMemory::logits(int64_t n, int64_t vocab, bool kl) const {
  const int64_t matrix = n * vocab;
  // The row losses of a CPU read float32; a gradient in the model's type is another copy.
  const int64_t own = gpu ? element : kFloat, copy = gpu || element == kFloat ? 0 : element;
  return matrix * ((kl ? 2 * own : own) + copy);
}

AttentionMemory KernelMemory::attention(const AttentionShape& shape,
                                        const PackedBatch& batch) const {
  if (gpu) return gpu_batch(*this, shape, batch.size());
  AttentionMemory all;
  for (size_t i = 0; i + 1 < batch.cu_seqlens.size(); ++i) {
    const AttentionMemory one =
        cpu_sequence(*this, shape, batch.cu_seqlens[i + 1] - batch.cu_seqlens[i]);
    all.saved += one.saved;  // the others are gone before the next sequence
    all.forward = std::max(all.forward, one.forward);
    all.backward = std::max(all.backward, one.backward);
  }
  return all;
}

}  // namespace safegrad
