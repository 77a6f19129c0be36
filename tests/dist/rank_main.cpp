#include "dist/rank_main.h"

#include <algorithm>

#include <fmt/format.h>
#include <gtest/gtest.h>

namespace safegrad::testing {

namespace {

class FailurePrinter : public ::testing::EmptyTestEventListener {
 public:
  explicit FailurePrinter(int rank) : rank_(rank) {}

 private:
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed()) return;
    fmt::print(stderr, "rank {}: {}:{}: {}\n", rank_, result.file_name() ? result.file_name() : "?",
               result.line_number(), result.message());
  }
  int rank_;
};

}  // namespace
}  // namespace safegrad::testing

int run_tests() {
  const auto world = safegrad::testing::world();
  if (world->rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new safegrad::testing::FailurePrinter(world->rank()));
  }
  const uint64_t failed = RUN_ALL_TESTS() != 0;
  const auto all = world->all_gather_words(std::span(&failed, 1));
  return static_cast<int>(*std::max_element(all.begin(), all.end()));
}

int main(int argc, char** argv) {
  const std::string cannot = safegrad::testing::start_ranks(&argc, &argv);
  if (!cannot.empty()) {
    fmt::print("[  SKIPPED ] every test of this program: {}\n", cannot);
    safegrad::testing::stop_ranks();
    return 0;
  }
  ::testing::InitGoogleTest(&argc, argv);
  const int result = run_tests();
  safegrad::testing::stop_ranks();
  return result;
}
