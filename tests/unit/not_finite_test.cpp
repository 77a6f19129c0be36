#include "core/not_finite.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

namespace safegrad {
namespace {

TEST(NotFinite, TextNamesLossesRanksAndUnits) {
  NotFinite what;
  EXPECT_EQ(to_text(what), "");
  what.losses["task"] = {1};
  EXPECT_EQ(to_text(what), "loss task on rank 1");
  what.losses["align"] = {0, 2};
  what.blocks = {{"embedding", {"task"}}, {"layers.0", {"task", "align"}}};
  EXPECT_EQ(to_text(what),
            "loss align on ranks 0, 2; loss task on rank 1; gradients of embedding (task), "
            "layers.0 (task, align)");
}

TEST(NotFinite, TextCountsUnitsThatAreTooManyToName) {
  NotFinite what;
  for (int i = 0; i < 9; ++i)
    what.blocks.emplace_back(fmt::format("u{}", i), std::vector<std::string>{"task"});
  EXPECT_EQ(to_text(what), "gradients of u0 (task), u1 (task), u2 (task), u3 (task) and 5 more");
}

TEST(NotFinite, MergingUnitesWithoutRepeating) {
  NotFinite a, b;
  a.losses["task"] = {2};
  a.blocks = {{"layers.1", {"task"}}};
  a.samples["task"] = {3, 7};
  b.losses = {{"task", {0, 2}}, {"align", {1}}};
  b.blocks = {{"layers.0", {"align"}}, {"layers.1", {"task", "align"}}};
  b.samples = {{"task", {7, 1}}, {"align", {4}}};

  a.merge(b);

  EXPECT_EQ(a.losses, (std::map<std::string, std::vector<int>>{{"align", {1}}, {"task", {0, 2}}}));
  EXPECT_EQ(a.blocks,
            (decltype(a.blocks){{"layers.1", {"task", "align"}}, {"layers.0", {"align"}}}));
  EXPECT_EQ(a.samples,
            (std::map<std::string, std::vector<int64_t>>{{"align", {4}}, {"task", {1, 3, 7}}}));
}

}  // namespace
}  // namespace safegrad
