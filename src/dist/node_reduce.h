// node_reduce.h: reduce-scatter among ranks of one machine, which read each other's buffers.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "dist/communicator.h"

namespace safegrad::dist {

/// Reduce-scatters of buffers that all ranks of a communicator map. Nothing is copied: a rank tells
/// that its buffer is complete, adds its slices of everybody's, and tells that it has read them.
/// Sums run in rank order, the same bits as by message.
class NodeReduce {
 public:
  /// Collective. Without effect (see available) where the ranks do not share a machine.
  explicit NodeReduce(Communicator& comm);
  ~NodeReduce();
  bool available() const { return flags_ != nullptr; }

  /// This rank's buffer [numel] of a set of one a rank; undefined on every rank where the set
  /// cannot be mapped. Collective.
  at::Tensor allocate(int64_t numel, at::ScalarType dtype);
  /// Null if `full` is not a whole buffer from allocate. Works are waited for in the order of their
  /// starts; at most 64 are under way. Waiting for one also waits until all ranks have read it.
  /// wait() throws CommError where ranks reduce different buffers, UsageError out of order.
  std::unique_ptr<Work> start(at::Tensor shard, const at::Tensor& full);

 private:
  class Sum;
  struct Flags;
  /// Returns when a rank's `counter` (ready or done) has come to reduction `number`.
  void await(uint64_t& counter, uint64_t number) const;

  Communicator& comm_;
  std::shared_ptr<std::byte> memory_;
  Flags* flags_ = nullptr;           // [ranks], seen by all
  std::vector<at::Tensor> buffers_;  // each [ranks, numel]
  uint64_t started_ = 0, finished_ = 0;
};

}  // namespace safegrad::dist
