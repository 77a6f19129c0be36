// separate_machines.h: ranks that do not see each other's memory, as on several machines.
#pragma once
#include <memory>

#include <ATen/ATen.h>

#include "dist/forwarding_communicator.h"
#include "dist/rank_main.h"

namespace safegrad::testing {

/// `inner` without shared memory: what is gathered travels in messages.
class SeparateMachines : public ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;
  dist::ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) override {
    return {at::zeros({numel}, on_device(dtype)), {}};
  }
  at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) override {
    return at::empty({numel}, on_device(dtype));
  }
  std::unique_ptr<dist::Communicator> split(int colour) override {
    return std::make_unique<SeparateMachines>(inner_->split(colour));
  }

 private:
  static at::TensorOptions on_device(at::ScalarType dtype) {
    return at::TensorOptions().dtype(dtype).device(backend().device());
  }
};

}  // namespace safegrad::testing
