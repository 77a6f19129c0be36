#include "dist/node_reduce.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <thread>

#include <ATen/ATen.h>

#include "core/error.h"
#include "dist/shared_memory.h"

namespace safegrad::dist {
namespace {

constexpr uint64_t kInFlight = 64;
constexpr int kSpins = 1000;           // then the core is left to a rank that may be waiting for it
constexpr int64_t kPiece = 64 * 1024;  // elements: a piece of the sum stays in the cache

}  // namespace

/// What one rank tells the others; reductions are numbered from 1.
struct alignas(64) NodeReduce::Flags {
  uint64_t ready;                          // its buffers of reductions up to this one are complete
  uint64_t done;                           // it has read everybody's
  std::array<uint64_t, kInFlight> buffer;  // which one it reduces in reduction i % kInFlight
};

class NodeReduce::Sum : public Work {
 public:
  Sum(NodeReduce& node, uint64_t number, uint64_t buffer, at::Tensor shard)
      : node_(node), number_(number), buffer_(buffer), shard_(std::move(shard)) {}

  void wait() override {
    if (!shard_.defined()) return;
    SAFEGRAD_CHECK(node_.finished_ + 1 == number_, UsageError,
                   "reduce_scatter: waited for number {} after number {}", number_,
                   node_.finished_);
    const int ranks = node_.comm_.size();
    for (int r = 0; r < ranks; ++r) {
      Flags& peer = node_.flags_[r];
      node_.await(peer.ready, number_);
      SAFEGRAD_CHECK(
          peer.buffer[number_ % kInFlight] == buffer_, CommError,
          "rank {} of {}: reduce_scatter number {}: this rank reduces buffer {}, rank {} "
          "buffer {}",
          node_.comm_.rank(), ranks, number_, buffer_, r, peer.buffer[number_ % kInFlight]);
    }
    add();
    node_.finished_ = number_;
    std::atomic_ref(node_.flags_[node_.comm_.rank()].done)
        .store(number_, std::memory_order_release);
    for (int r = 0; r < ranks; ++r) node_.await(node_.flags_[r].done, number_);
    shard_.reset();
  }

 private:
  void add() {
    const at::Tensor slices = node_.buffers_[buffer_].narrow(1, node_.comm_.rank() * shard_.numel(),
                                                             shard_.numel());  // [ranks, S]
    for (int64_t begin = 0; begin < shard_.numel(); begin += kPiece) {
      const int64_t n = std::min(kPiece, shard_.numel() - begin);
      const at::Tensor piece = slices.narrow(1, begin, n);
      at::Tensor sum = shard_.narrow(0, begin, n);
      at::add_out(sum, piece[0], piece[1]);
      for (int64_t r = 2; r < piece.size(0); ++r) sum.add_(piece[r]);
    }
  }

  NodeReduce& node_;
  uint64_t number_, buffer_;
  at::Tensor shard_;
};

NodeReduce::NodeReduce(Communicator& comm) : comm_(comm) {
  if (comm.size() == 1) return;
  memory_ = map_shared_memory(comm, sizeof(Flags) * static_cast<size_t>(comm.size()));
  flags_ = reinterpret_cast<Flags*>(memory_.get());
}

NodeReduce::~NodeReduce() = default;

at::Tensor NodeReduce::allocate(int64_t numel, at::ScalarType dtype) {
  if (!available() || numel == 0) return {};
  at::Tensor set = allocate_shared(comm_, comm_.size() * numel, dtype);
  if (!set.defined()) return {};
  buffers_.push_back(set.view({comm_.size(), numel}));
  return buffers_.back()[comm_.rank()];
}

std::unique_ptr<Work> NodeReduce::start(at::Tensor shard, const at::Tensor& full) {
  const auto found = std::find_if(buffers_.begin(), buffers_.end(), [&](const at::Tensor& set) {
    const at::Tensor own = set[comm_.rank()];
    return own.data_ptr() == full.data_ptr() && own.numel() == full.numel();
  });
  if (found == buffers_.end()) return nullptr;
  const auto buffer = static_cast<uint64_t>(found - buffers_.begin());
  SAFEGRAD_CHECK(started_ - finished_ < kInFlight, UsageError,
                 "reduce_scatter: {} under way, at most {}", started_ - finished_, kInFlight);
  ++started_;
  Flags& own = flags_[comm_.rank()];
  own.buffer[started_ % kInFlight] = buffer;
  std::atomic_ref(own.ready).store(started_, std::memory_order_release);
  return std::make_unique<Sum>(*this, started_, buffer, std::move(shard));
}

void NodeReduce::await(uint64_t& counter, uint64_t number) const {
  const std::atomic_ref seen(counter);
  for (int spin = 0; seen.load(std::memory_order_acquire) < number;) {
    if (spin < kSpins) {
      ++spin;
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace safegrad::dist
