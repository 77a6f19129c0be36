// kernels.h: launchers of the CUDA kernels: raw pointers and sizes, no CUDA or tensor headers.
//
// Every call enqueues on `stream` and returns; it throws RunError if a launch is refused. Sizes and
// strides are in elements, all pointers are of the current device, T is f32 or bf16 (`Element`),
// arithmetic is f32 in the functions of core/{layer,loss,vector}_math.h. Where pointers, strides
// and widths allow it, memory moves 16 bytes an access, else element by element. Sums are made in
// an order that depends on the sizes alone, never on the card: the same bits every time.
#pragma once
#include <cstdint>

#include "core/layer_math.h"
#include "core/vector_math.h"

struct CUstream_st;

namespace safegrad::cuda {

using Stream = CUstream_st*;

enum class Element { f32, bf16 };

/// Rows of `width` elements, `stride` apart.
struct Rows {
  void* data;
  int64_t stride;
};
struct ConstRows {
  const void* data;
  int64_t stride;
};

/// A row wider than kWidestGpuNorm is refused with UsageError.
/// y [rows, width] contiguous = x rstd weight; rstd [rows] f32.
void rms_norm(Element element, ConstRows x, const void* weight, float eps, void* y, float* rstd,
              int64_t rows, int64_t width, Stream stream);

/// Where the weight gradient of one segment goes; `partials`: norm_partials(width) * width floats.
struct NormWeightGradient {
  void* gradient;  ///< [width] of `element`, or null: only dx
  Element element;
  bool fresh;  ///< overwrite instead of add
  float* partials;
};
/// Partial weight gradients that rms_norm_backward may write.
int64_t norm_partials(int64_t width);
/// Rows of one segment: dx += the input gradient, gradient += Σ_rows dy x rstd, in one sweep.
void rms_norm_backward(Element element, ConstRows dy, ConstRows x, const float* rstd,
                       const void* weight, Rows dx, const NormWeightGradient& weight_gradient,
                       int64_t rows, int64_t width, Stream stream);

/// x [tokens, heads, width] in place; heads lie `width` apart, tokens x.stride. cos, sin
/// [positions, width / 2].
void rotate(Element element, Rows x, const int64_t* positions, const float* cosine,
            const float* sine, bool inverse, int64_t tokens, int64_t heads, int64_t width,
            Stream stream);

/// act [rows, width] from gate_up [rows, 2 width].
void swiglu(Element element, const void* gate_up, void* act, int64_t rows, int64_t width,
            Stream stream);
void swiglu_backward(Element element, const void* dact, const void* gate_up, void* dgate_up,
                     void* act, int64_t rows, int64_t width, Stream stream);

/// y = x · draw, [rows, width]; keys, positions [rows].
void dropout(Element element, const void* x, const int64_t* keys, const int64_t* positions,
             uint64_t site, DropoutDraw draw, void* y, int64_t rows, int64_t width, Stream stream);

/// sums [rows] += scale Σ_j a b of every row.
void add_row_products(Element element, ConstRows a, ConstRows b, double scale, double* sums,
                      int64_t rows, int64_t width, Stream stream);

/// logits [rows, width] <- gradient; loss [1] += Σ rows; row_losses [rows] is scratch.
void cross_entropy_rows(Element element, void* logits, const int64_t* targets, double* row_losses,
                        double* loss, int64_t rows, int64_t width, Stream stream);
void kl_rows(Element element, void* logits, const void* reference, double* row_losses, double* loss,
             int64_t rows, int64_t width, Stream stream);

inline constexpr int kMaxGradients = 4;

/// Doubles of scratch that add_inner_products writes.
int64_t gram_partials(int count, int64_t size);
/// gram [count, count] += g_i·g_j over `size` elements.
void add_inner_products(const float* const* gradients, int count, int64_t size, double* partials,
                        double* gram, Stream stream);

/// Elements [begin, end) of a shard; `decays`: weight decay applies to them.
struct Range {
  int64_t begin, end;
  bool decays;
};
/// What one update reads and writes.
struct UpdateArguments {
  const float* gradients[kMaxGradients];
  float coefficients[kMaxGradients];
  int count;
  float *master, *m, *v;
  void* compute;  ///< copy of master in `element`, or null: there is none
  Element element;
};
/// AdamW of g = Σ c_k g_k on the ranges: one launch for every 64 of them.
void update(const UpdateArguments& arguments, const AdamW& adamw, const Range* ranges, int64_t n,
            Stream stream);

}  // namespace safegrad::cuda
