// late_collectives.h: collectives as late as they may be, to find reads and writes that do not
// wait.
#pragma once
#include <functional>
#include <limits>
#include <memory>
#include <utility>

#include "dist/separate_machines.h"

namespace safegrad::testing {

/// A collective's whole work is done in wait(), and not before. Until then its output holds
/// NaN, and its input is read only then: whoever reads a result too early computes with NaN, and
/// whoever changes an input too early sends the change. On a GPU the same contract holds between
/// streams; here it is checked without one.
class LateCollectives : public SeparateMachines {
 public:
  using SeparateMachines::SeparateMachines;

  std::unique_ptr<dist::Work> all_gather(at::Tensor full, at::Tensor shard) override {
    return late(full, [this, full, shard] { return inner_->all_gather(full, shard); });
  }
  std::unique_ptr<dist::Work> reduce_scatter(at::Tensor shard, at::Tensor full) override {
    return late(shard, [this, full, shard] { return inner_->reduce_scatter(shard, full); });
  }
  std::unique_ptr<dist::Communicator> split(int colour) override {
    return std::make_unique<LateCollectives>(inner_->split(colour));
  }

 private:
  using Start = std::function<std::unique_ptr<dist::Work>()>;

  class LateWork : public dist::Work {
   public:
    explicit LateWork(Start start) : start_(std::move(start)) {}
    void wait() override { start_()->wait(); }

   private:
    Start start_;
  };

  static std::unique_ptr<dist::Work> late(at::Tensor output, Start start) {
    output.fill_(std::numeric_limits<double>::quiet_NaN());
    return std::make_unique<LateWork>(std::move(start));
  }
};

}  // namespace safegrad::testing
