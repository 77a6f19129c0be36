#include "sample_list.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace safegrad {

std::vector<int64_t> by_score(const std::vector<double>& scores, double no_number) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  auto key = [&](int64_t i) {
    const double score = scores[static_cast<size_t>(i)];
    return std::isfinite(score) ? score : no_number;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return key(a) < key(b); });
  return order;
}

std::string source_of(const TokenFile& task, int64_t i) {
  return task.sources()[static_cast<size_t>(task.source(i))];
}

std::string sample_lines(const TokenFile& task, const std::vector<int64_t>& order,
                         const std::function<nlohmann::ordered_json(int64_t)>& found) {
  std::string lines;
  for (int64_t i : order) {
    nlohmann::ordered_json json = {{"index", i}};
    json.update(found(i));
    json["tokens"] = task.length(i);
    json["scored"] = task.scored(i);
    if (task.has_sources()) json["source"] = source_of(task, i);
    lines += json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  }
  return lines;
}

}  // namespace safegrad
