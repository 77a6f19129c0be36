#include "core/not_finite.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace safegrad {
namespace {

constexpr size_t kMostNamed = 4;  // blocks in a line for people; the records have all

template <class T>
void unite(std::vector<T>& into, const std::vector<T>& other) {
  into.insert(into.end(), other.begin(), other.end());
  std::sort(into.begin(), into.end());
  into.erase(std::unique(into.begin(), into.end()), into.end());
}

}  // namespace

void NotFinite::merge(const NotFinite& other) {
  for (const auto& [objective, ranks] : other.losses) unite(losses[objective], ranks);
  for (const auto& [objective, indexes] : other.samples) unite(samples[objective], indexes);
  for (const auto& [name, objectives] : other.blocks) {
    const auto same =
        std::find_if(blocks.begin(), blocks.end(),
                     [&wanted = name](const auto& block) { return block.first == wanted; });
    if (same == blocks.end()) {
      blocks.emplace_back(name, objectives);
      continue;
    }
    for (const std::string& objective : objectives) {
      if (std::find(same->second.begin(), same->second.end(), objective) == same->second.end())
        same->second.push_back(objective);
    }
  }
}

std::string to_text(const NotFinite& what) {
  std::vector<std::string> parts, blocks;
  for (const auto& [objective, ranks] : what.losses) {
    parts.push_back(fmt::format("loss {} on {} {}", objective, ranks.size() == 1 ? "rank" : "ranks",
                                fmt::join(ranks, ", ")));
  }
  const size_t named = std::min(kMostNamed, what.blocks.size());
  for (size_t i = 0; i < named; ++i) {
    blocks.push_back(
        fmt::format("{} ({})", what.blocks[i].first, fmt::join(what.blocks[i].second, ", ")));
  }
  if (named > 0) {
    const std::string more =
        what.blocks.size() > named ? fmt::format(" and {} more", what.blocks.size() - named) : "";
    parts.push_back(fmt::format("gradients of {}{}", fmt::join(blocks, ", "), more));
  }
  return fmt::format("{}", fmt::join(parts, "; "));
}

}  // namespace safegrad
