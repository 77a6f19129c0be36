#include "dist/fake_communicator.h"

#include <utility>

#include <ATen/ATen.h>

#include "core/error.h"
#include "dist/message_sizes.h"

namespace safegrad::dist {
namespace {

int64_t size_in_bytes(const at::Tensor& t) {
  return t.numel() * t.element_size();
}

// Holds what the real work would: the buffer that pieces of others arrive in.
class FakeWork : public Work {
 public:
  explicit FakeWork(at::Tensor received = {}) : received_(std::move(received)) {}
  void wait() override {}

 private:
  at::Tensor received_;
};

at::Tensor receive_buffer(int ranks, const at::Tensor& shard) {
  const ReceiveWindow window(ranks, shard.numel(), shard.element_size());
  return at::empty({window.numel}, shard.options());
}

void require_fit(const at::Tensor& full, const at::Tensor& shard, int ranks,
                 const char* operation) {
  SAFEGRAD_CHECK(full.numel() == shard.numel() * ranks, UsageError,
                 "{}: {} elements do not fit {} a rank on {} ranks", operation, full.numel(),
                 shard.numel(), ranks);
}

}  // namespace

std::vector<uint64_t> FakeCommunicator::all_gather_words(std::span<const uint64_t> words) {
  count("scalars", static_cast<int64_t>((size_ - 1) * words.size_bytes()));
  std::vector<uint64_t> all(words.size() * static_cast<size_t>(size_), 0);
  std::copy(words.begin(), words.end(),
            all.begin() + static_cast<std::ptrdiff_t>(words.size() * static_cast<size_t>(rank_)));
  return all;
}

std::string FakeCommunicator::broadcast(const std::string& text, int root) {
  SAFEGRAD_CHECK(root == rank_, UsageError,
                 "rank {} of {}: what rank {} would broadcast is not known: it is not there", rank_,
                 size_, root);
  return text;
}

ShardMemory FakeCommunicator::allocate_shards(int64_t numel, at::ScalarType dtype) {
  return {at::zeros({numel}, dtype), {}};
}

at::Tensor FakeCommunicator::allocate_reduce_input(int64_t numel, at::ScalarType dtype) {
  return at::empty({numel}, dtype);
}

at::Tensor FakeCommunicator::allocate_gather_output(int64_t numel, at::ScalarType dtype) {
  return at::empty({numel}, dtype);
}

std::unique_ptr<Work> FakeCommunicator::all_gather(at::Tensor full, at::Tensor shard) {
  require_fit(full, shard, size_, "all_gather");
  count("all_gather", (size_ - 1) * size_in_bytes(shard));
  full.zero_();
  full.narrow(0, rank_ * shard.numel(), shard.numel()).copy_(shard);
  return std::make_unique<FakeWork>();
}

std::unique_ptr<Work> FakeCommunicator::reduce_scatter(at::Tensor shard, at::Tensor full) {
  require_fit(full, shard, size_, "reduce_scatter");
  count("reduce_scatter", (size_ - 1) * size_in_bytes(shard));
  shard.copy_(full.narrow(0, rank_ * shard.numel(), shard.numel()));
  if (size_ == 1) return std::make_unique<FakeWork>();
  return std::make_unique<FakeWork>(receive_buffer(size_, shard));
}

// A reduce-scatter and an all-gather, as over MPI; what does not divide travels padded.
void FakeCommunicator::all_reduce(at::Tensor t) {
  count("all_reduce", 2 * (size_ - 1) * size_in_bytes(t) / size_);
  if (size_ == 1 || t.numel() == 0) return;
  const int64_t n = (t.numel() + size_ - 1) / size_;
  at::Tensor padded;
  if (n * size_ != t.numel())
    padded = at::cat({t, at::zeros({n * size_ - t.numel()}, t.options())});
  const at::Tensor shard = at::empty({n}, t.options());
  receive_buffer(size_, shard);
}

std::vector<double> FakeCommunicator::all_gather_scalars(const at::Tensor& values) {
  count("scalars", (size_ - 1) * size_in_bytes(values));
  std::vector<double> all(static_cast<size_t>(values.numel() * size_), 0.0);
  const double* own = values.const_data_ptr<double>();
  std::copy(own, own + values.numel(), all.begin() + rank_ * values.numel());
  return all;
}

std::unique_ptr<Communicator> FakeCommunicator::split(int) {
  throw UsageError(fmt::format(
      "rank {} of {}: which ranks have the same colour is not known: they are not there; "
      "make_fake_mesh makes the groups of a mesh",
      rank_, size_));
}

Mesh make_fake_mesh(int rank, int ranks, int64_t shards) {
  Mesh::check(ranks, shards);
  const int in_group = shards == 0 ? ranks : static_cast<int>(shards);
  auto fake = [](int place, int size) { return std::make_unique<FakeCommunicator>(place, size); };
  return {fake(rank, ranks), fake(rank % in_group, in_group),
          fake(rank / in_group, ranks / in_group)};
}

}  // namespace safegrad::dist
