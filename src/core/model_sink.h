// model_sink.h: where a finished model goes, tensor by tensor, so that no rank holds a whole one.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace safegrad {

/// A tensor of an exported model.
struct ExportEntry {
  std::string name;
  std::vector<int64_t> shape;
};

/// Receives a model on one rank: begin with every entry, then each tensor in that order, then
/// finish. Whatever was at the destination stays until finish. Throws RunError (path, reason) when
/// the disk refuses.
class ModelSink {
 public:
  virtual ~ModelSink() = default;
  virtual void begin(const std::vector<ExportEntry>& entries) = 0;
  /// `value` is on the model's device.
  virtual void put(const std::string& name, const at::Tensor& value) = 0;
  virtual void finish() = 0;
};

}  // namespace safegrad
