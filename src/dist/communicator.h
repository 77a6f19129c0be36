// communicator.h: the only collectives the trainer may use, over a fixed set of ranks.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace safegrad::dist {

/// Calls and payload of one kind of collective. `bytes` counts what this rank sends: shards
/// for a gather or a reduce-scatter, 2 (R-1)/R of the tensor for an all-reduce, its own words
/// times for the small ones.
struct Traffic {
  int64_t calls = 0, bytes = 0;
};

/// A collective under way. wait() returns when this rank's result is complete and its inputs may be
/// changed.
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

/// A fixed set of ranks that issue the same collectives in the same order. Tensors are contiguous
/// and on this rank's device. Sums run in rank order on every rank, so results are the same bits
/// every run. A failure throws CommError with rank, operation and the backend's text. Every backend
/// counts its traffic by collective.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;  ///< [0, size())
  virtual int size() const = 0;

  /// Zeros for a shard on every rank. Where all ranks share a machine, `all` is the memory of all
  /// of them: gathering it moves nothing. Its owner may write a shard only while no rank reads it,
  /// so there is a collective between any rank's last read and the write, and another between the
  /// write and the next read. Collective.
  virtual ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) = 0;
  /// A buffer [numel] for the input of reduce_scatter, uninitialised. Where all ranks share a
  /// machine they read each other's in place: every rank reduces the buffer that it got from the
  /// same call, and waits for reductions in the order in which it started them. Collective.
  virtual at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) = 0;
  /// A buffer [numel] for the output of all_gather, uninitialised. Collective.
  virtual at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) = 0;
  /// full [n * size()] <- shard [n] of all ranks, in rank order. Counted alike where they come from
  /// allocate_shards.
  virtual std::unique_ptr<Work> all_gather(at::Tensor full, at::Tensor shard) = 0;
  /// shard [n] <- this rank's n elements of the sum over ranks of full [n * size()].
  virtual std::unique_ptr<Work> reduce_scatter(at::Tensor shard, at::Tensor full) = 0;
  /// t <- sum over ranks of t; blocks.
  virtual void all_reduce(at::Tensor t) = 0;
  /// The words of all ranks, in rank order [size() * words.size()]; blocks. Carries the scalars
  /// that steer control flow: whoever sums them in rank order gets the same bits everywhere.
  virtual std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) = 0;
  /// values [n] f64 on the device -> of all ranks in rank order, on the host [size() * n].
  virtual std::vector<double> all_gather_scalars(const at::Tensor& values) = 0;
  /// text of rank `root` on every rank; blocks.
  virtual std::string broadcast(const std::string& text, int root) = 0;
  virtual void barrier() = 0;
  /// The ranks with the same colour, ordered by rank.
  virtual std::unique_ptr<Communicator> split(int colour) = 0;

  /// Counters since start, by collective name ("all_gather", "reduce_scatter", "all_reduce",
  /// "scalars").
  const std::map<std::string, Traffic>& traffic() const { return traffic_; }

 protected:
  void count(const std::string& name, int64_t bytes);

 private:
  std::map<std::string, Traffic> traffic_;
};

/// all_gather_words for doubles, bit by bit.
std::vector<double> all_gather_doubles(Communicator& comm, std::span<const double> values);

/// Runs `work` on every rank. Where it throws on any, JobFailed leaves on every rank: with the
/// error's text on the lowest failing rank, without on the others. For checks that can fail on one
/// rank alone: no rank goes on to a collective that another never enters.
void agree(Communicator& comm, const std::function<void()>& work);

}  // namespace safegrad::dist
