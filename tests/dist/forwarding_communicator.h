// forwarding_communicator.h: a communicator that hands everything to another one; tests change a
// part.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dist/communicator.h"

namespace safegrad::testing {

class ForwardingCommunicator : public dist::Communicator {
 public:
  explicit ForwardingCommunicator(std::unique_ptr<dist::Communicator> inner)
      : inner_(std::move(inner)) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  dist::ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) override {
    return inner_->allocate_shards(numel, dtype);
  }
  void finish_shard_writes() override { inner_->finish_shard_writes(); }
  at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) override {
    return inner_->allocate_gather_output(numel, dtype);
  }
  at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) override {
    return inner_->allocate_reduce_input(numel, dtype);
  }
  std::unique_ptr<dist::Work> all_gather(at::Tensor full, at::Tensor shard) override {
    return inner_->all_gather(std::move(full), std::move(shard));
  }
  std::unique_ptr<dist::Work> reduce_scatter(at::Tensor shard, at::Tensor full) override {
    return inner_->reduce_scatter(std::move(shard), std::move(full));
  }
  void all_reduce(at::Tensor t) override { inner_->all_reduce(std::move(t)); }
  std::vector<double> all_gather_scalars(const at::Tensor& values) override {
    return inner_->all_gather_scalars(values);
  }
  std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) override {
    return inner_->all_gather_words(words);
  }
  std::string broadcast(const std::string& text, int root) override {
    return inner_->broadcast(text, root);
  }
  void barrier() override { inner_->barrier(); }
  std::unique_ptr<dist::ControlPlane> split_control(int colour) override {
    return inner_->split_control(colour);
  }
  const std::map<std::string, dist::Traffic>& inner_traffic() const { return inner_->traffic(); }

 protected:
  std::unique_ptr<dist::Communicator> inner_;
};

}  // namespace safegrad::testing
