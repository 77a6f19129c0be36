#include "dist/solo_communicator.h"

#include <ATen/ATen.h>

#include "core/error.h"

namespace safegrad::dist {
namespace {

class NoWork : public Work {
 public:
  void wait() override {}
};

std::unique_ptr<Work> copy(const at::Tensor& to, const at::Tensor& from, const char* operation) {
  SAFEGRAD_CHECK(to.numel() == from.numel(), UsageError,
                 "{}: {} elements do not fit {} on one rank", operation, to.numel(), from.numel());
  if (to.data_ptr() != from.data_ptr()) to.copy_(from);
  return std::make_unique<NoWork>();
}

}  // namespace

std::vector<uint64_t> SoloCommunicator::all_gather_words(std::span<const uint64_t> words) {
  count("scalars", 0);
  return {words.begin(), words.end()};
}

ShardMemory SoloCommunicator::allocate_shards(int64_t numel, at::ScalarType dtype) {
  const at::Tensor own = at::zeros({numel}, dtype);
  return {own, own};
}

at::Tensor SoloCommunicator::allocate_reduce_input(int64_t numel, at::ScalarType dtype) {
  return at::empty({numel}, dtype);
}

at::Tensor SoloCommunicator::allocate_gather_output(int64_t numel, at::ScalarType dtype) {
  return at::empty({numel}, dtype);
}

std::unique_ptr<Work> SoloCommunicator::all_gather(at::Tensor full, at::Tensor shard) {
  count("all_gather", 0);
  return copy(full, shard, "all_gather");
}

std::unique_ptr<Work> SoloCommunicator::reduce_scatter(at::Tensor shard, at::Tensor full) {
  count("reduce_scatter", 0);
  return copy(shard, full, "reduce_scatter");
}

std::vector<double> SoloCommunicator::all_gather_scalars(const at::Tensor& values) {
  count("scalars", 0);
  const double* data = values.data_ptr<double>();
  return {data, data + values.numel()};
}

std::unique_ptr<Communicator> SoloCommunicator::split(int) {
  return std::make_unique<SoloCommunicator>();
}

}  // namespace safegrad::dist
