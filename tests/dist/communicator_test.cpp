// communicator_test.cpp: every collective against what it should give, on any number of ranks.
#include "dist/communicator.h"

#include <cmath>
#include <numeric>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "dist/rank_main.h"
#include "dist/shared_memory.h"

namespace safegrad::testing {
namespace {

// What rank r has: n different numbers whose sums are exact in float32.
at::Tensor values_of(int rank, int64_t n) {
  return at::arange(n, at::kFloat) + static_cast<float>(1000 * rank);
}

at::Tensor values_of_all(int ranks, int64_t n) {
  std::vector<at::Tensor> parts;
  for (int r = 0; r < ranks; ++r) parts.push_back(values_of(r, n));
  return at::cat(parts);
}

// Less than a message, a piece that is not whole, and several pieces.
constexpr int64_t kSizes[] = {1, 7, 70'001, 500'003};

TEST(Communicator, AllGatherPutsShardsInRankOrder) {
  const auto comm = world();
  for (int64_t n : kSizes) {
    const at::Tensor full = at::empty({n * comm->size()}, at::kFloat);

    comm->all_gather(full, values_of(comm->rank(), n))->wait();

    EXPECT_TRUE(full.equal(values_of_all(comm->size(), n))) << n;
  }
}

TEST(Communicator, ReduceScatterSumsEachRanksSlice) {
  const auto comm = world();
  for (int64_t n : kSizes) {
    at::Tensor expected = at::zeros({n}, at::kFloat);
    for (int r = 0; r < comm->size(); ++r)
      expected += values_of(r, n * comm->size()).narrow(0, comm->rank() * n, n);
    const at::Tensor shard = at::empty({n}, at::kFloat);

    comm->reduce_scatter(shard, values_of(comm->rank(), n * comm->size()))->wait();

    EXPECT_TRUE(shard.equal(expected)) << n;
  }
}

TEST(Communicator, AllReduceSumsSizesThatDoNotDivide) {
  const auto comm = world();
  for (int64_t n : kSizes) {
    at::Tensor expected = at::zeros({n}, at::kFloat);
    for (int r = 0; r < comm->size(); ++r) expected += values_of(r, n);
    at::Tensor own = values_of(comm->rank(), n);

    comm->all_reduce(own);

    EXPECT_TRUE(own.equal(expected)) << n;
  }
}

TEST(Communicator, CollectivesUnderWayDoNotMix) {
  const auto comm = world();
  constexpr int64_t kNumel = 100'000;
  std::vector<at::Tensor> gathered, reduced;
  std::vector<std::unique_ptr<dist::Work>> works;
  for (int i = 0; i < 3; ++i) {
    gathered.push_back(at::empty({kNumel * comm->size()}, at::kFloat));
    works.push_back(comm->all_gather(gathered.back(), values_of(comm->rank(), kNumel) + i));
    reduced.push_back(at::empty({kNumel}, at::kFloat));
    works.push_back(comm->reduce_scatter(
        reduced.back(), at::full({kNumel * comm->size()}, static_cast<float>(i + 1))));
  }

  for (const auto& work : works) work->wait();

  for (int i = 0; i < 3; ++i) {
    const auto which = static_cast<size_t>(i);
    EXPECT_TRUE(gathered[which].equal(values_of_all(comm->size(), kNumel) + i)) << i;
    EXPECT_TRUE(reduced[which].eq(static_cast<float>((i + 1) * comm->size())).all().item<bool>());
  }
}

TEST(Communicator, ScalarsOfAllRanksArriveInRankOrderAndAreCounted) {
  const auto comm = world();
  const at::Tensor own = at::empty({3}, at::kDouble);
  for (int64_t i = 0; i < 3; ++i) own[i].fill_(comm->rank() + std::ldexp(1.0, -50) * i);

  const std::vector<double> all = comm->all_gather_scalars(own);

  ASSERT_EQ(all.size(), static_cast<size_t>(3 * comm->size()));
  for (int r = 0; r < comm->size(); ++r) {
    for (int i = 0; i < 3; ++i) {  // to the bit: float32 would lose the small part
      EXPECT_EQ(all[static_cast<size_t>(3 * r + i)], r + std::ldexp(1.0, -50) * i) << r << " " << i;
    }
  }
  EXPECT_EQ(comm->traffic().at("scalars").calls, 1);
  EXPECT_EQ(comm->traffic().at("scalars").bytes, 3 * 8 * (comm->size() - 1));
  EXPECT_THROW(comm->all_gather_scalars(at::zeros({3}, at::kFloat)), UsageError);
}

TEST(Communicator, GatherOutputsHoldWhatIsGatheredIntoThem) {
  const auto comm = world();
  for (int64_t n : {int64_t{0}, int64_t{1}, int64_t{70'001}}) {
    const at::Tensor full = comm->allocate_gather_output(n * comm->size(), at::kFloat);
    ASSERT_EQ(full.numel(), n * comm->size());
    ASSERT_EQ(full.scalar_type(), at::kFloat);
    full.fill_(-1);

    comm->all_gather(full, values_of(comm->rank(), n))->wait();

    EXPECT_TRUE(full.equal(values_of_all(comm->size(), n))) << n;
  }
}

TEST(Communicator, ASplitControlsTheRanksOfOneColour) {
  const auto comm = world();
  const auto part = comm->split_control(comm->rank() % 2);
  const uint64_t own = static_cast<uint64_t>(comm->rank());

  std::vector<uint64_t> expected;
  for (int r = comm->rank() % 2; r < comm->size(); r += 2)
    expected.push_back(static_cast<uint64_t>(r));
  EXPECT_EQ(part->size(), static_cast<int>(expected.size()));
  EXPECT_EQ(part->rank(), comm->rank() / 2);
  EXPECT_EQ(part->all_gather_words(std::span(&own, 1)), expected);
}

TEST(Communicator, ShardsOfOneMachineNeedNoGather) {
  const auto comm = world();
  if (comm->size() == 1) GTEST_SKIP() << "one rank shares nothing";
  constexpr int64_t kNumel = 12'345;
  const dist::ShardMemory memory = comm->allocate_shards(kNumel, at::kFloat);
  ASSERT_TRUE(memory.all.defined()) << "the test's ranks run on one machine";
  EXPECT_FALSE(memory.all.any().item<bool>()) << "fresh memory is zero";
  comm->barrier();
  memory.own.copy_(values_of(comm->rank(), kNumel));
  comm->barrier();

  EXPECT_TRUE(memory.all.equal(values_of_all(comm->size(), kNumel)));
  comm->all_gather(memory.all, memory.own)->wait();
  EXPECT_EQ(comm->traffic().at("all_gather").calls, 1) << "counted as if it had travelled";
  EXPECT_EQ(comm->traffic().at("all_gather").bytes, (comm->size() - 1) * kNumel * 4);
  EXPECT_TRUE(memory.all.equal(values_of_all(comm->size(), kNumel)));
  comm->barrier();
}

TEST(Communicator, BuffersThatAllRanksSeeReduceLikeMessages) {
  const auto comm = world();
  constexpr int64_t kNumel = 100'007;
  std::vector<at::Tensor> inputs, by_message, in_place;
  for (int i = 0; i < 3; ++i) {
    at::Tensor input = comm->allocate_reduce_input(kNumel * comm->size(), at::kFloat);
    input.copy_(at::rand({input.numel()}, at::make_generator<at::CPUGeneratorImpl>(
                                              static_cast<uint64_t>(10 * comm->rank() + i))));
    inputs.push_back(input);
    by_message.push_back(at::empty({kNumel}, at::kFloat));
    in_place.push_back(at::empty({kNumel}, at::kFloat));
    comm->reduce_scatter(by_message.back(), input.clone())->wait();
  }
  for (int round = 0; round < 50; ++round) {  // more than are ever under way
    std::vector<std::unique_ptr<dist::Work>> works;
    for (size_t i = 0; i < inputs.size(); ++i)
      works.push_back(comm->reduce_scatter(in_place[i], inputs[i]));
    for (const auto& work : works) work->wait();
  }

  for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(in_place[i].equal(by_message[i])) << i;
}

TEST(Communicator, AReducedBufferMayBeOverwritten) {
  const auto comm = world();
  constexpr int64_t kNumel = 5'000;
  const at::Tensor input = comm->allocate_reduce_input(kNumel * comm->size(), at::kFloat);
  const at::Tensor shard = at::empty({kNumel}, at::kFloat);
  for (int round = 0; round < 200; ++round) {
    input.fill_(static_cast<float>(round));
    comm->reduce_scatter(shard, input)->wait();
    ASSERT_TRUE(shard.eq(static_cast<float>(round * comm->size())).all().item<bool>()) << round;
  }
}

TEST(Communicator, RanksThatReduceDifferentBuffersAreToldSo) {
  const auto comm = world();
  if (comm->size() == 1) GTEST_SKIP() << "one rank cannot disagree";
  const at::Tensor shard = at::empty({8}, at::kFloat);
  const at::Tensor inputs[] = {comm->allocate_reduce_input(8 * comm->size(), at::kFloat),
                               comm->allocate_reduce_input(8 * comm->size(), at::kFloat)};
  const auto work = comm->reduce_scatter(shard, inputs[comm->rank() == 0]);

  EXPECT_THROW(work->wait(), CommError);
  comm->barrier();
}

TEST(Communicator, ReductionsAreWaitedForInOrder) {
  const auto comm = world();
  if (comm->size() == 1) GTEST_SKIP() << "one rank waits for nothing";
  const at::Tensor shard = at::empty({8}, at::kFloat);
  const at::Tensor input = comm->allocate_reduce_input(8 * comm->size(), at::kFloat);
  const auto first = comm->reduce_scatter(shard, input);
  const auto second = comm->reduce_scatter(shard, input);

  EXPECT_THROW(second->wait(), UsageError);
  first->wait();
  second->wait();
}

TEST(Communicator, SharedMemoryOutlivesItsCommunicator) {
  at::Tensor all;
  {
    const auto comm = world();
    const dist::ShardMemory memory = comm->allocate_shards(64, at::kInt);
    memory.own.fill_(comm->rank());
    comm->barrier();
    all = memory.all;
  }
  if (!all.defined()) GTEST_SKIP() << "one rank shares nothing";

  EXPECT_EQ(all[all.size(0) - 1].item<int>(), world()->size() - 1);
}

TEST(Communicator, MemoryThatCannotBeHadIsRefusedOnEveryRank) {
  const auto comm = world();

  EXPECT_EQ(dist::map_shared_memory(*comm, size_t{1} << 62), nullptr);
}

TEST(Communicator, SizesThatDoNotFitAreRefused) {
  const auto comm = world();
  const at::Tensor shard = at::zeros({4}, at::kFloat);

  EXPECT_THROW(comm->all_gather(at::zeros({4 * comm->size() + 1}), shard), UsageError);
  EXPECT_THROW(comm->reduce_scatter(shard, at::zeros({4 * comm->size() + 1})), UsageError);
}

}  // namespace
}  // namespace safegrad::testing
