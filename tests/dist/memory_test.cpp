// memory_test.cpp: a step's record has the memory of the rank that has held most.
#include <algorithm>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/machine_memory.h"
#include "dist/rank_main.h"
#include "dist/tiny_job.h"

namespace safegrad::testing {
namespace {

/// The tests' device, with a memory that the test sets.
class KnownMemory final : public Backend {
 public:
  at::Device device() const override { return backend().device(); }
  std::string name() const override { return backend().name(); }
  const Kernels& kernels() const override { return backend().kernels(); }
  at::Tensor upload(const at::Tensor& host) const override { return backend().upload(host); }
  std::unique_ptr<Stopwatch> make_stopwatch(size_t phases) const override {
    return backend().make_stopwatch(phases);
  }
  double measure_gemm_rate(at::ScalarType dtype) const override {
    return backend().measure_gemm_rate(dtype);
  }
  int64_t take_peak_bytes() const override { return backend().take_peak_bytes(); }
  int64_t peak_bytes() const override { return peak; }

  int64_t peak = 0;
};

class Memory : public ::testing::Test {
 protected:
  Memory() : all_(world()), folder_(*all_), config_(tiny_config("qwen2", folder_.path())) {
    if (all_->rank() == 0) write_tiny_data(config_);
    all_->barrier();
  }
  void TearDown() override { all_->barrier(); }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
  RunConfig config_;
};

TEST_F(Memory, OfTheFullestRankIsRecordedOnAll) {
  KnownMemory device;
  TinyJob job(config_, world(), device);
  const int64_t large = (int64_t{1} << 52) + 1;  // whole numbers travel in doubles
  for (int fullest = 0; fullest < all_->size(); ++fullest) {
    device.peak = all_->rank() == fullest ? large + fullest : 1000 + all_->rank();
    EXPECT_EQ(job.run(fullest, fullest + 1)[0].memory_bytes, large + fullest);
  }
  device.peak = 0;
  EXPECT_FALSE(job.run(10, 11)[0].memory_bytes) << "not known, not zero";
  device.peak = all_->rank() == 0 ? 7 : 0;
  EXPECT_EQ(job.run(11, 12)[0].memory_bytes, 7);
}

TEST_F(Memory, OfAProcessCountsWhatItHasTouched) {
  if (!backend().device().is_cpu()) GTEST_SKIP() << "of CPU ranks";
  TinyJob job(config_, world());
  const auto before = job.run(0, 1)[0].memory_bytes;
  ASSERT_TRUE(before);
  constexpr int64_t kMore = int64_t{256} << 20;
  // On the last rank alone, and gone when the step runs: a peak stays.
  if (all_->rank() == all_->size() - 1) at::ones({kMore}, at::kByte);
  const auto after = job.run(1, 2)[0].memory_bytes;
  // Half: other ranks may have held more before, by some libraries' pages.
  EXPECT_GT(*after - *before, kMore / 2);
  EXPECT_GE(*after, peak_resident_bytes("") - kMore / 16) << "this rank's own, but for the update";
}

}  // namespace
}  // namespace safegrad::testing
