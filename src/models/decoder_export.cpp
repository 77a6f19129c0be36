// decoder_export.cpp: a decoder's tensors under their Hugging Face names.
#include <ATen/ATen.h>

#include "models/decoder.h"

namespace safegrad::models {
namespace {

// PEFT's name of an adapter tensor.
std::string peft_name(const Parameter& p) {
  return "base_model.model." + p.name;
}

std::vector<int64_t> piece_shape(const Parameter& p, const Piece& piece) {
  std::vector<int64_t> shape = p.shape;
  shape[0] = piece.rows;
  return shape;
}

}  // namespace

std::vector<ExportEntry> Decoder::export_entries(bool merged) const {
  std::vector<ExportEntry> entries;
  const bool adapters_only = adapter_unit_ >= 0 && !merged;
  for (size_t u = 0; u < units_.size(); ++u) {
    const bool is_adapters = static_cast<int>(u) == adapter_unit_;
    if (is_adapters != adapters_only) continue;
    for (const Parameter* p : units_[u].parameters) {
      if (adapters_only) {
        entries.push_back({peft_name(*p), p->shape});
        continue;
      }
      for (const Piece& piece : p->pieces) entries.push_back({piece.name, piece_shape(*p, piece)});
    }
  }
  return entries;
}

void Decoder::export_unit(size_t unit, bool merged, ModelSink& sink) const {
  const bool is_adapters = static_cast<int>(unit) == adapter_unit_;
  const bool adapters_only = adapter_unit_ >= 0 && !merged;
  if (is_adapters != adapters_only) return;
  for (const Parameter* p : units_[unit].parameters) {
    if (adapters_only) {
      sink.put(peft_name(*p), p->value);
      continue;
    }
    for (const Piece& piece : p->pieces) {
      const at::Tensor base = p->value.narrow(0, piece.row, piece.rows);
      const auto adapter = adapters_.find(piece.name);
      if (adapter == adapters_.end()) {
        sink.put(piece.name, base);
        continue;
      }
      const auto& [a, b, scale] = adapter->second;
      const at::Tensor delta = at::mm(b->value.to(at::kFloat), a->value.to(at::kFloat));
      sink.put(piece.name, base.to(at::kFloat).add(delta, scale).to(base.scalar_type()));
    }
  }
}

}  // namespace safegrad::models
