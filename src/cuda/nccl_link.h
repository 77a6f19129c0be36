// nccl_link.h: one NCCL communicator with a stream of its own.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/nccl_options.h"
#include "dist/control_plane.h"

struct ncclComm;

namespace safegrad::cuda {

/// Collectives of two or more ranks in the order of their calls, on a stream of high priority: each
/// starts behind what is on the current stream, and returns at once with the event after it. Every
/// call first looks for failures of earlier ones. A failure aborts this link and all that were
/// split from the same one, and throws CommError with rank, operation and NCCL's text. One host
/// thread a process uses links.
class NcclLink {
 public:
  /// Meets the other ranks. Collective; throws CommError after the deadline.
  NcclLink(dist::ControlPlane& control, int device, NcclOptions options);
  /// Waits for the other ranks' destructors; after a failure, or while an exception passes, aborts
  /// instead. Does not throw.
  ~NcclLink();
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;
  /// The ranks with the same colour, ordered by rank; null for colour kNone. Collective over this
  /// link, on which nothing is under way.
  std::unique_ptr<NcclLink> split(int colour, int rank, int size);
  static constexpr int kNone = -1;

  c10::cuda::CUDAStream stream() const { return stream_; }
  /// Memory [numel > 0] that the network knows, uninitialised. Collective; the tensor may outlive
  /// the link, and waits for the device when it goes.
  at::Tensor allocate(int64_t numel, at::ScalarType dtype);

  /// full [n * size] <- shard [n] of all ranks.
  c10::cuda::CUDAEvent all_gather(const at::Tensor& full, const at::Tensor& shard);
  /// shard [n] <- this rank's part of the sum over ranks of full [n * size].
  c10::cuda::CUDAEvent reduce_scatter(const at::Tensor& shard, const at::Tensor& full);
  /// t <- sum over ranks of t.
  c10::cuda::CUDAEvent all_reduce(const at::Tensor& t);
  /// The host waits for `event`, a failure on any link of the same origin, or the deadline.
  void await(const c10::cuda::CUDAEvent& event, const char* operation);

 private:
  struct Registry;
  struct Family;
  NcclLink(int rank, int size, c10::DeviceIndex device, NcclOptions options,
           std::shared_ptr<Family> family);
  c10::cuda::CUDAEvent enqueue(const char* operation, const std::function<int()>& call);
  void accept(int code, const char* operation);
  bool is_ready(const char* operation);
  void await_ready(const char* operation);
  [[noreturn]] void fail(const char* operation, const std::string& why);
  void abort() noexcept;

  int rank_, size_;
  c10::DeviceIndex device_;
  NcclOptions options_;
  c10::cuda::CUDAStream stream_;
  std::shared_ptr<Family> family_;      // all links that have come of one
  std::shared_ptr<Registry> registry_;  // with the communicator, and memory that outlives it
};

}  // namespace safegrad::cuda
