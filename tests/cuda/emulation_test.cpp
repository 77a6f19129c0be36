// Mistakes that a GPU would leave undefined fail under the emulation: else its tests prove little.
#include <cmath>
#include <stdexcept>
#include <vector>

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "cuda/emulation/faulty_kernels.h"

namespace safegrad::test {
namespace {

using emulation::Order;

class Emulation : public testing::Test {
 protected:
  void TearDown() override { emulation::set_order(Order::forward, Order::forward); }

  static std::vector<float> numbers(int n) {
    std::vector<float> x;
    for (int i = 0; i < n; ++i) x.push_back(static_cast<float>(i));
    return x;
  }
  template <typename Launch>
  static std::string error_of(const Launch& launch) {
    try {
      launch();
    } catch (const std::logic_error& error) {
      return error.what();
    }
    return "";
  }
};

TEST_F(Emulation, ABarrierMakesWhatWasWrittenVisibleInAnyOrder) {
  const std::vector<float> in = numbers(96);
  for (Order order : {Order::forward, Order::reversed, Order::shuffled}) {
    emulation::set_order(order, Order::forward);
    std::vector<float> out(96, -1.0f);
    mirror(in.data(), out.data(), 96);
    EXPECT_EQ(out, std::vector<float>(in.rbegin(), in.rend()));
  }
}

TEST_F(Emulation, WithoutTheBarrierTheResultIsPoisonedAndDependsOnTheOrder) {
  const std::vector<float> in = numbers(96);
  std::vector<float> forward(96, -1.0f), reversed(96, -1.0f);
  mirror_without_barrier(in.data(), forward.data(), 96);
  emulation::set_order(Order::reversed, Order::forward);
  mirror_without_barrier(in.data(), reversed.data(), 96);
  EXPECT_TRUE(std::isnan(forward[0]));
  EXPECT_FALSE(std::isnan(reversed[0]));
}

TEST_F(Emulation, ABarrierThatSomeThreadsMissIsAnError) {
  const std::string error = error_of([] { leave_before_barrier(64); });
  EXPECT_NE(error.find("32 at a barrier"), std::string::npos) << error;
  EXPECT_NE(error.find("32 finished"), std::string::npos) << error;
  EXPECT_NE(error.find("faulty_kernels.cu:"), std::string::npos) << error;
}

TEST_F(Emulation, TwoBarriersAreNotOne) {
  EXPECT_NE(error_of([] { wait_at_different_barriers(64); }), "");
}

TEST_F(Emulation, AShuffleThatALaneMissesIsAnError) {
  const std::string error = error_of([] { leave_before_shuffle(32); });
  EXPECT_NE(error.find("31 at a shuffle"), std::string::npos) << error;
}

TEST_F(Emulation, AfterAnErrorTheNextLaunchRuns) {
  EXPECT_NE(error_of([] { leave_before_barrier(64); }), "");
  const std::vector<float> in = numbers(32);
  std::vector<float> out(32);
  mirror(in.data(), out.data(), 32);
  EXPECT_EQ(out[0], 31.0f);
}

TEST_F(Emulation, EveryBlockStartsWithPoisonedSharedMemory) {
  std::vector<float> out(128);
  read_unwritten(out.data(), 128);  // two blocks: the second must not see what the first wrote
  for (float x : out) EXPECT_TRUE(std::isnan(x));
}

TEST_F(Emulation, BlocksRunInTheChosenOrder) {
  std::vector<float> last;
  for (Order order : {Order::forward, Order::reversed, Order::shuffled}) {
    emulation::set_order(Order::forward, order);
    float out = -1.0f;
    overwrite_each_other(&out, 100);
    last.push_back(out);
  }
  EXPECT_EQ(last[0], 99.0f);
  EXPECT_EQ(last[1], 0.0f);
  EXPECT_NE(last[2], 99.0f);
}

TEST_F(Emulation, ARefusedLaunchNamesTheKernelAndTheReason) {
  const std::vector<float> in = numbers(96);
  std::vector<float> out(96);
  try {
    mirror(in.data(), out.data(), 2048);
    FAIL() << "2048 threads in a block were accepted";
  } catch (const RunError& error) {
    EXPECT_STREQ(error.what(),
                 "CUDA kernel mirror could not be launched: invalid configuration argument");
  }
}

}  // namespace
}  // namespace safegrad::test
