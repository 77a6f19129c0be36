// communicator.h: the only collectives of tensors that the trainer may use.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "dist/control_plane.h"

namespace safegrad::dist {

/// Calls and payload of one kind of collective. `bytes` counts what this rank sends: shards
/// for a gather or a reduce-scatter, 2 (R-1)/R of the tensor for an all-reduce, its own words
/// times for the small ones.
struct Traffic {
  int64_t calls = 0, bytes = 0;
};

/// A collective under way. After wait() this rank's result may be read and its inputs changed: by
/// the host, or, where the tensors are on a GPU, by whatever is then enqueued on the current stream
/// (the host goes on).
class Work {
 public:
  virtual ~Work() = default;
  virtual void wait() = 0;
};

/// Memory for shards [n] of one buffer; see Communicator::allocate_shards.
struct ShardMemory {
  at::Tensor own;  ///< [n] this rank's shard
  at::Tensor all;  ///< [n * size()] every rank's shard in rank order, or undefined
};

/// Ranks that exchange tensors as well. Tensors are contiguous and on this rank's device. Over MPI
/// sums run in rank order, so results are the same bits every run. Every backend counts its traffic
/// by collective.
class Communicator : public ControlPlane {
 public:
  /// Zeros for a shard on every rank. Where all ranks share a machine, `all` is the memory of all
  /// of them: gathering it moves nothing. Its owner may write a shard only while no rank reads it,
  /// so there is a collective between any rank's last read and the write, and finish_shard_writes
  /// between the write and the next read. Collective.
  virtual ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) = 0;
  /// Every rank has written its shards: waits for the others where they are seen in place, else
  /// does nothing.
  virtual void finish_shard_writes() = 0;
  /// A buffer [numel] for the input of reduce_scatter, uninitialised. Where all ranks share a
  /// machine they read each other's in place: every rank reduces the buffer that it got from the
  /// same call, and waits for reductions in the order in which it started them. Collective.
  virtual at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) = 0;
  /// A buffer [numel] for the output of all_gather, uninitialised; known to the network where that
  /// makes gathers faster. Collective.
  virtual at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) = 0;
  /// full [n * size()] <- shard [n] of all ranks, in rank order. Counted alike where they come from
  /// allocate_shards.
  virtual std::unique_ptr<Work> all_gather(at::Tensor full, at::Tensor shard) = 0;
  /// shard [n] <- this rank's n elements of the sum over ranks of full [n * size()].
  virtual std::unique_ptr<Work> reduce_scatter(at::Tensor shard, at::Tensor full) = 0;
  /// t <- sum over ranks of t, complete as after Work::wait().
  virtual void all_reduce(at::Tensor t) = 0;
  /// values [n] of fp64 of all ranks, in rank order, on the host [size() * n]; blocks. The one
  /// point of a step at which the host waits for the device.
  virtual std::vector<double> all_gather_scalars(const at::Tensor& values) = 0;
  /// The ranks with the same colour, ordered by rank.
  virtual std::unique_ptr<Communicator> split(int colour) = 0;
  std::unique_ptr<ControlPlane> split_control(int colour) override { return split(colour); }

  /// Counters since start, by collective name ("all_gather", "reduce_scatter", "all_reduce",
  /// "scalars": all_gather_scalars and all_gather_words).
  virtual const std::map<std::string, Traffic>& traffic() const { return traffic_; }

 protected:
  void count(const std::string& name, int64_t bytes);

 private:
  std::map<std::string, Traffic> traffic_;
};

}  // namespace safegrad::dist
