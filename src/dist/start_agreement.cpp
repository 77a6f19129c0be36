#include "dist/start_agreement.h"

#include <algorithm>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/random.h"
#include "dist/job_failed.h"

namespace safegrad::dist {
namespace {

// So many opinions and differences say what is wrong; a job of thousands of ranks that disagree
// everywhere would exchange and print for minutes.
constexpr size_t kMostOpinions = 8, kMostDifferences = 12;

/// Ranks that gave the same facts.
struct Opinion {
  std::vector<int> ranks;
  std::map<std::string, std::string> facts;  // value by name
};

// Names and values, each with its length before it: any text can be a value.
std::string encode(const std::vector<Fact>& facts, bool may_differ) {
  std::string text;
  for (const Fact& fact : facts) {
    if (fact.may_differ != may_differ) continue;
    for (const std::string& part : {fact.name, fact.value})
      text += fmt::format("{}:{}", part.size(), part);
  }
  return text;
}

std::map<std::string, std::string> decode(std::string_view text) {
  auto next = [&text] {
    const size_t colon = text.find(':');
    const size_t length = std::stoull(std::string(text.substr(0, colon)));
    const std::string part(text.substr(colon + 1, length));
    text.remove_prefix(colon + 1 + length);
    return part;
  };
  std::map<std::string, std::string> facts;
  while (!text.empty()) {
    const std::string name = next();
    facts[name] = next();
  }
  return facts;
}

uint64_t hash(const std::string& text) {
  uint64_t value = mix64(0, text.size());
  for (const char c : text) value = mix64(value, static_cast<unsigned char>(c));
  return value;
}

// "optimizer.lr: 0.001 on ranks 0-2; 0.1 on rank 3", or nothing where all have the same value.
std::string difference(const std::string& name, const std::vector<Opinion>& opinions) {
  std::vector<std::pair<std::string, std::vector<int>>> values;  // in the order of first ranks
  for (const Opinion& opinion : opinions) {
    const auto found = opinion.facts.find(name);
    const std::string value = found == opinion.facts.end() ? "not given" : found->second;
    auto same = std::find_if(values.begin(), values.end(),
                             [&](const auto& known) { return known.first == value; });
    if (same == values.end()) same = values.insert(values.end(), {value, {}});
    same->second.insert(same->second.end(), opinion.ranks.begin(), opinion.ranks.end());
  }
  if (values.size() == 1) return "";
  std::vector<std::string> texts;
  for (auto& [value, ranks] : values) {
    std::sort(ranks.begin(), ranks.end());
    texts.push_back(
        fmt::format("{} on {} {}", value, ranks.size() == 1 ? "rank" : "ranks", list_ranks(ranks)));
  }
  return fmt::format("{}: {}", name, fmt::join(texts, "; "));
}

// One line for each fact that differs; `hashes` of all ranks' texts. Collective.
std::vector<std::string> hear_differences(ControlPlane& control,
                                          const std::vector<uint64_t>& hashes,
                                          const std::string& own) {
  std::map<uint64_t, size_t> known;
  std::vector<Opinion> opinions;
  for (size_t r = 0; r < hashes.size(); ++r) {
    const auto [place, is_new] = known.emplace(hashes[r], opinions.size());
    if (is_new) opinions.emplace_back();
    opinions[place->second].ranks.push_back(static_cast<int>(r));
  }
  if (opinions.size() == 1) return {};
  if (opinions.size() > kMostOpinions) opinions.resize(kMostOpinions);
  std::set<std::string> names;
  for (Opinion& opinion : opinions) {
    opinion.facts = decode(control.broadcast(own, opinion.ranks.front()));
    for (const auto& [name, value] : opinion.facts) names.insert(name);
  }
  std::vector<std::string> lines;
  for (const std::string& name : names) {
    std::string line = difference(name, opinions);
    if (!line.empty()) lines.push_back(std::move(line));
  }
  return lines;
}

}  // namespace

std::string list_ranks(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += end - i == 1
                ? fmt::format("{}", ranks[i])
                : fmt::format("{}{}{}", ranks[i], end - i == 2 ? ", " : "-", ranks[end - 1]);
    i = end;
  }
  return text;
}

void check_same_start(ControlPlane& control, const std::vector<Fact>& facts,
                      std::vector<std::string>& warnings) {
  // Apart from each other: a difference that does no harm must not hide one that does.
  const std::string texts[] = {encode(facts, false), encode(facts, true)};
  const uint64_t own[] = {hash(texts[0]), hash(texts[1])};
  const auto all = control.all_gather_words(own);
  std::vector<uint64_t> hashes[2];
  for (size_t i = 0; i < all.size(); ++i) hashes[i % 2].push_back(all[i]);

  std::vector<std::string> refused = hear_differences(control, hashes[0], texts[0]);
  if (!refused.empty()) {
    std::string more;
    if (refused.size() > kMostDifferences) {
      more = fmt::format(" | and {} more", refused.size() - kMostDifferences);
      refused.resize(kMostDifferences);
    }
    const std::string message = fmt::format(
        "the ranks of this job were not given the same: {}{}; give every rank the same program, "
        "command line, config and files",
        fmt::join(refused, " | "), more);
    throw JobFailed(control.rank() == 0 ? message : "", 1);
  }
  for (const std::string& line : hear_differences(control, hashes[1], texts[1]))
    warnings.push_back("the ranks differ in " + line);
}

}  // namespace safegrad::dist
