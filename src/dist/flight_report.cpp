#include "dist/flight_report.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/json.h"

namespace safegrad::dist {
namespace {

using nlohmann::json;

constexpr std::array<const char*, 3> kStates = {"started", "awaited", "finished"};

std::string describe(const Flight& flight) {
  std::string text =
      fmt::format("{} {} of {}", flight.operation, flight.group_number, flight.group);
  if (!flight.subject.empty()) text += fmt::format(" ({})", flight.subject);
  return text;
}

std::string name_ranks(const std::vector<int>& ranks) {
  return fmt::format("rank{} {}", ranks.size() > 1 ? "s" : "", fmt::join(ranks, ", "));
}

const Flight* find_awaited(const FlightLog& log) {
  const auto found =
      std::find_if(log.flights.begin(), log.flights.end(),
                   [&](const Flight& flight) { return flight.number == log.awaited; });
  return log.awaited && found != log.flights.end() ? &*found : nullptr;
}

// The collective that holds up the first rank that is held up.
const Flight* find_pivot(const std::vector<FlightLog>& logs) {
  for (const FlightLog& log : logs) {
    if (const Flight* flight = find_awaited(log)) return flight;
  }
  return nullptr;
}

// How far a rank has come in `group`, and what it called there as `number`.
struct Progress {
  int64_t last = 0;
  const Flight* same_number = nullptr;
};

Progress progress_of(const FlightLog& log, const std::string& group, int64_t number) {
  Progress progress;
  for (const Flight& flight : log.flights) {
    if (flight.group != group) continue;
    progress.last = std::max(progress.last, flight.group_number);
    if (flight.group_number == number) progress.same_number = &flight;
  }
  return progress;
}

bool is_same_call(const Flight& a, const Flight& b) {
  return a.operation == b.operation && a.subject == b.subject &&
         (a.bytes == b.bytes || a.bytes < 0 || b.bytes < 0);
}

std::string describe_call(const Flight& flight) {
  std::string text = flight.operation;
  if (!flight.subject.empty()) text += fmt::format(" ({})", flight.subject);
  if (flight.bytes >= 0) text += fmt::format(" of {} bytes", flight.bytes);
  return text;
}

std::string describe_calls(const Flight& pivot,
                           const std::map<std::string, std::vector<int>>& calls) {
  std::vector<std::string> parts;
  for (const auto& [call, ranks] : calls)
    parts.push_back(fmt::format("{} on {}", call, name_ranks(ranks)));
  return fmt::format("the ranks call different collectives: number {} of {} is {}",
                     pivot.group_number, pivot.group, fmt::join(parts, ", "));
}

std::string find_verdict(const std::vector<FlightLog>& logs, const std::vector<int>& silent) {
  const Flight* pivot = find_pivot(logs);
  std::vector<int> behind;
  std::map<std::string, std::vector<int>> calls;
  bool differ = false;
  for (const FlightLog& log : logs) {
    if (!pivot) break;
    const Progress progress = progress_of(log, pivot->group, pivot->group_number);
    if (progress.same_number) {
      calls[describe_call(*progress.same_number)].push_back(log.rank);
      differ = differ || !is_same_call(*progress.same_number, *pivot);
    } else if (progress.last > 0 && progress.last < pivot->group_number) {
      behind.push_back(log.rank);
    }
  }
  if (differ) return describe_calls(*pivot, calls);
  if (!silent.empty()) {
    return fmt::format("{} give{} no sign of life: stopped, gone, or without a view of this folder",
                       name_ranks(silent), silent.size() > 1 ? "" : "s");
  }
  if (!behind.empty()) {
    return fmt::format("{} {} not come to {}", name_ranks(behind),
                       behind.size() > 1 ? "have" : "has", describe(*pivot));
  }
  if (pivot)
    return fmt::format("all its ranks have come to {}: what they send does not arrive", describe(*pivot));
  return "no rank is held up any more";
}

}  // namespace

std::string to_json(const FlightLog& log) {
  json flights = json::array();
  for (const Flight& f : log.flights) {
    json entry = {{"number", f.number},
                  {"group", f.group},
                  {"group_number", f.group_number},
                  {"operation", f.operation},
                  {"subject", f.subject},
                  {"bytes", f.bytes >= 0 ? json(f.bytes) : json()},
                  {"state", kStates[static_cast<size_t>(f.state)]},
                  {"started", f.started},
                  {"finished", f.finished > 0 ? json(f.finished) : json()}};
    flights.push_back(std::move(entry));
  }
  const json text = {{"rank", log.rank},
                     {"ranks", log.ranks},
                     {"host", log.host},
                     {"pid", log.pid},
                     {"written", log.written},
                     {"awaited", log.awaited ? json(*log.awaited) : json()},
                     {"collectives", std::move(flights)}};
  return text.dump(1) + "\n";
}

FlightLog parse_flight_log(const std::string& text, const std::string& where) {
  try {
    const json value = parse_json(text, where);
    FlightLog log;
    log.rank = value.at("rank");
    log.ranks = value.at("ranks");
    log.host = value.at("host");
    log.pid = value.at("pid");
    log.written = value.at("written");
    if (!value.at("awaited").is_null()) log.awaited = value.at("awaited").get<int64_t>();
    for (const json& entry : value.at("collectives")) {
      Flight flight;
      flight.number = entry.at("number");
      flight.group = entry.at("group");
      flight.group_number = entry.at("group_number");
      flight.operation = entry.at("operation");
      flight.subject = entry.at("subject");
      if (!entry.at("bytes").is_null()) flight.bytes = entry.at("bytes");
      const auto state =
          std::find(kStates.begin(), kStates.end(), entry.at("state").get<std::string>());
      SAFEGRAD_CHECK(state != kStates.end(), InputError, "{}: unknown state", where);
      flight.state = static_cast<Flight::State>(state - kStates.begin());
      flight.started = entry.at("started");
      if (!entry.at("finished").is_null()) flight.finished = entry.at("finished");
      log.flights.push_back(std::move(flight));
    }
    return log;
  } catch (const json::exception& e) {
    throw InputError(fmt::format("{}: not a flight record: {}", where, e.what()));
  }
}

std::string explain_rank(const FlightLog& log) {
  if (const Flight* flight = find_awaited(log)) {
    return fmt::format("in {} for {:.0f} s", describe(*flight), log.written - flight->started);
  }
  if (log.flights.empty()) return "before its first collective";
  const Flight& last = log.flights.back();
  return fmt::format("computing; {:.0f} s ago {} {}",
                     log.written - std::max(last.started, last.finished),
                     last.finished > 0 ? "finished" : "started", describe(last));
}

std::string explain_standstill(std::vector<FlightLog> logs) {
  std::sort(logs.begin(), logs.end(),
            [](const FlightLog& a, const FlightLog& b) { return a.rank < b.rank; });
  std::vector<int> silent;
  for (int rank = 0; rank < logs.front().ranks; ++rank) {
    const bool present = std::any_of(logs.begin(), logs.end(),
                                     [&](const FlightLog& log) { return log.rank == rank; });
    if (!present) silent.push_back(rank);
  }
  std::vector<std::pair<std::string, std::vector<int>>> doing;  // in the order of ranks
  for (const FlightLog& log : logs) {
    const std::string text = explain_rank(log);
    auto found = std::find_if(doing.begin(), doing.end(),
                              [&](const auto& entry) { return entry.first == text; });
    if (found == doing.end()) found = doing.insert(doing.end(), {text, {}});
    found->second.push_back(log.rank);
  }
  std::string report = find_verdict(logs, silent);
  for (const auto& [text, ranks] : doing)
    report += fmt::format("\n  {}: {}", name_ranks(ranks), text);
  if (!silent.empty()) report += fmt::format("\n  {}: no flight record", name_ranks(silent));
  return report;
}

}  // namespace safegrad::dist
