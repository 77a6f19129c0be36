// rotary.h: angles of the rotary position embedding.
#pragma once
#include <utility>

#include <ATen/core/Tensor.h>

#include "models/hf_config.h"

namespace safegrad::models {

/// cos and sin [positions, head_dim / 2] f32 of position · θ^(−2i/d), with Llama-3's frequency
/// scaling where the config has it. Frequencies are rounded to float first, as transformers does,
/// so that logits agree at long positions too.
std::pair<at::Tensor, at::Tensor> rotary_tables(const DecoderConfig& config, int64_t positions);

}  // namespace safegrad::models
