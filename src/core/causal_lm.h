// causal_lm.h: what the distributed trainer sees of a model; it knows no ranks, the trainer knows
// no layers.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/backend.h"
#include "core/model_sink.h"
#include "core/packed_batch.h"
#include "core/parameter.h"

namespace safegrad {

struct KernelMemory;

/// What one block keeps from forward to backward; only the model looks inside.
class Activations {
 public:
  virtual ~Activations() = default;
};

/// Matrix-product work in floating-point operations; see CausalLM::flops.
struct Flops {
  double forward = 0, input_grad = 0, weight_grad = 0;
  double scores = 0;  ///< of objective 0's tokens with the directions; not in total()
  double total() const { return forward + input_grad + weight_grad; }
};

/// Bytes of tensors of one block, without parameters and their gradients.
struct BlockMemory {
  int64_t kept = 0;      ///< from forward to backward, besides the block's input
  int64_t forward = 0;   ///< most at a time in forward_block besides its input; `kept`, y included
  int64_t backward = 0;  ///< most at a time in backward_block besides the input, `kept` and dy
  int64_t scored = 0;    ///< the same where objective 0's tokens are scored
};

/// A decoder-only language model as a list of units. D width, T tokens of the batch, V vocabulary.
/// Where the batch has token_scores, what "adds a weight gradient" adds scores, too, and reads the
/// parameters' directions; a parameter without a gradient buffer takes no gradient. No call
/// communicates. Each call reads parameters of the units named in its comment, which must be
/// gathered.
class CausalLM {
 public:
  virtual ~CausalLM() = default;

  /// Where it computes: batches and parameters are there.
  virtual const Backend& backend() const = 0;
  virtual int64_t width() const = 0;
  virtual int64_t vocab_size() const = 0;
  virtual int64_t max_positions() const = 0;
  virtual int64_t blocks() const = 0;

  /// All units in a fixed order; the parameters live as long as the model.
  virtual const std::vector<Unit>& units() const = 0;
  virtual size_t embedding_unit() const = 0;
  virtual size_t block_unit(int64_t block) const = 0;
  /// Units that final_norm and the head read (tied embeddings: the embedding's unit is one of
  /// them).
  virtual std::vector<size_t> head_units() const = 0;
  /// The adapters' unit, or -1.
  virtual int adapter_unit() const = 0;

  /// Lowest block whose backward is needed; `blocks()` if only the head trains, -1 if the embedding
  /// does.
  virtual int64_t lowest_trainable_block() const = 0;

  /// x [T, D] <- rows of the embedding table. Reads the embedding unit.
  virtual at::Tensor embed(const PackedBatch& batch) = 0;
  /// Writes the embedding's gradient of every objective from dx [T, D]. Reads no values.
  virtual void embed_backward(const PackedBatch& batch, const at::Tensor& dx) = 0;

  /// y [T, D] <- block(x). Reads the block's unit and the adapters. `keep` receives what backward
  /// needs; null: nothing is kept.
  virtual at::Tensor forward_block(int64_t block, const at::Tensor& x, const PackedBatch& batch,
                                   std::unique_ptr<Activations>* keep) = 0;
  /// dx [T, D] (undefined unless `need_dx`) <- dy [T, D]; adds every weight gradient, per
  /// objective. Consumes dy and `kept`.
  virtual at::Tensor backward_block(int64_t block, std::unique_ptr<Activations> kept, at::Tensor dy,
                                    const PackedBatch& batch, bool need_dx) = 0;

  /// h [S, D] <- final norm of the rows x [S, D].
  virtual at::Tensor final_norm(const at::Tensor& x) = 0;
  /// dx [S, D]; adds the norm's weight gradient of every objective's scored rows.
  virtual at::Tensor final_norm_backward(const at::Tensor& x, const at::Tensor& dh,
                                         const PackedBatch& batch) = 0;
  /// The output matrix [V, D]; the embedding table where tied.
  virtual Parameter& head() = 0;

  /// What an export holds: the adapters alone (LoRA, not merged), else every base tensor, adapters
  /// merged into them.
  virtual std::vector<ExportEntry> export_entries(bool merged) const = 0;
  /// Sends a unit's part of that to `sink`, in the order of export_entries. Reads the unit and, if
  /// merged, the adapters.
  virtual void export_unit(size_t unit, bool merged, ModelSink& sink) const = 0;

  /// Necessary matrix products for this batch (design §2, "speed of light"): forward, input
  /// gradients, and weight gradients where trainable. Recomputation and the reference head are not
  /// in it. Attention counts the causal half. The batch's tensors may be undefined.
  virtual Flops flops(const PackedBatch& batch) const = 0;
  /// What a block of the batch takes; all blocks take as much. The batch's tensors may be
  /// undefined.
  virtual BlockMemory block_memory(const PackedBatch& batch, const KernelMemory& kernels) const = 0;
  /// Bytes of tables that grow with the longest sequence.
  virtual int64_t table_bytes(const PackedBatch& batch) const = 0;
};

}  // namespace safegrad
