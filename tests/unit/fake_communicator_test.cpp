#include "dist/fake_communicator.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "cpu/allocation_count.h"

namespace safegrad {
namespace {

using dist::FakeCommunicator;

at::Tensor count_up(int64_t n) {
  return at::arange(1, n + 1, at::kFloat);
}

TEST(FakeCommunicator, AGatherHasItsOwnShardInItsPlaceAndZeros) {
  FakeCommunicator ranks(2, 4);
  at::Tensor full = at::full({12}, 7.0f);
  ranks.all_gather(full, count_up(3))->wait();

  EXPECT_TRUE(at::equal(full, at::cat({at::zeros({6}), count_up(3), at::zeros({3})})));
  EXPECT_EQ(ranks.traffic().at("all_gather").bytes, 3 * 3 * 4);
}

TEST(FakeCommunicator, AReductionIsItsOwnPart) {
  FakeCommunicator ranks(1, 3);
  at::Tensor shard = at::zeros({2});
  ranks.reduce_scatter(shard, count_up(6))->wait();

  EXPECT_TRUE(at::equal(shard, at::tensor({3.0f, 4.0f})));
  EXPECT_EQ(ranks.traffic().at("reduce_scatter").bytes, 2 * 2 * 4);
}

TEST(FakeCommunicator, ScalarsAndWordsOfOthersAreZero) {
  FakeCommunicator ranks(1, 3);
  const uint64_t word = 9;

  EXPECT_EQ(ranks.all_gather_scalars(at::tensor({1.5, 2.5}, at::kDouble)),
            (std::vector<double>{0, 0, 1.5, 2.5, 0, 0}));
  EXPECT_EQ(ranks.all_gather_words(std::span(&word, 1)), (std::vector<uint64_t>{0, 9, 0}));
}

TEST(FakeCommunicator, WhatOnlyOthersKnowIsRefused) {
  FakeCommunicator ranks(1, 3);

  EXPECT_EQ(ranks.broadcast("own", 1), "own");
  EXPECT_THROW(ranks.broadcast("", 0), UsageError);
  EXPECT_THROW(ranks.split(0), UsageError);
  EXPECT_THROW(ranks.all_gather(at::zeros({5}), at::zeros({2})), UsageError);
}

TEST(FakeCommunicator, AMeshOfThemHasTheGroupsOfItsRank) {
  dist::Mesh mesh = dist::make_fake_mesh(7, 12, 4);  // replica 1, shard 3

  EXPECT_EQ(mesh.world().rank(), 7);
  EXPECT_EQ(mesh.shard_group().rank(), 3);
  EXPECT_EQ(mesh.shards(), 4);
  EXPECT_EQ(mesh.replica_group().rank(), 1);
  EXPECT_EQ(mesh.replicas(), 3);
  EXPECT_EQ(dist::make_fake_mesh(7, 12, 0).shards(), 12);
  EXPECT_THROW(dist::make_fake_mesh(0, 12, 5), InputError);
}

TEST(AllocationCount, CountsTensorsUntilTheyAreFreed) {
  const at::Tensor before = at::zeros({1000});
  at::Tensor outlives;
  {
    AllocationCount count;
    EXPECT_EQ(count.bytes(), 0);
    at::Tensor kept = at::zeros({100});
    { const at::Tensor gone = at::zeros({50}); }
    EXPECT_EQ(count.bytes(), 400);
    EXPECT_EQ(count.take_peak(), 600);
    EXPECT_EQ(count.take_peak(), 400);
    outlives = kept;
    kept = at::empty({0});
    EXPECT_EQ(count.bytes(), 400);
  }
  EXPECT_EQ(outlives.sum().item<float>(), 0) << "memory made under a counter outlives it";
}

}  // namespace
}  // namespace safegrad
