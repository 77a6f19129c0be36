#include "core/key_lister.h"

#include <algorithm>
#include <cstddef>

namespace safegrad {
namespace {

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b` (optimal
/// string alignment).
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> before(b.size() + 1), row(b.size() + 1), next(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    next[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = row[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      next[j] = std::min({row[j] + 1, next[j - 1] + 1, replaced});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        next[j] = std::min(next[j], before[j - 2] + 1);
      }
    }
    std::swap(before, row);
    std::swap(row, next);
  }
  return row[b.size()];
}

}  // namespace

std::string nearest_name(std::string_view name, const std::vector<std::string>& names) {
  size_t best = std::max<size_t>(1, name.size() / 3) + 1;  // farther than this is another word
  std::string nearest;
  for (const std::string& candidate : names) {
    const size_t distance = edit_distance(name, candidate);
    if (distance < best) {
      best = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

std::string nearest_key(const std::string& prefix, std::string_view name,
                        const std::vector<std::string>& own) {
  const std::vector<std::string> everywhere = list_keys<RunConfig>("").all;
  const std::string path = prefix + std::string(name);
  if (std::find(everywhere.begin(), everywhere.end(), path) != everywhere.end()) return path;

  const std::string nearest = nearest_name(name, own);
  if (!nearest.empty()) return prefix + nearest;

  for (const std::string& key : everywhere) {
    if (key.substr(key.rfind('.') + 1) == name) return key;
  }
  return {};
}

}  // namespace safegrad
