#include "dist/flight_report.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/json.h"
#include "dist/start_agreement.h"

namespace safegrad::dist {
namespace {

using nlohmann::json;

constexpr std::array<const char*, 3> kStates = {"started", "awaited", "finished"};
constexpr size_t kNamedPlaces = 4;

std::string describe(const Flight& flight) {
  std::string text =
      fmt::format("{} {} of {}", flight.operation, flight.group_number, flight.group);
  if (!flight.subject.empty()) text += fmt::format(" ({})", flight.subject);
  return text;
}

std::string name_ranks(const std::vector<int>& ranks) {
  return fmt::format("rank{} {}", ranks.size() > 1 ? "s" : "", list_ranks(ranks));
}

// With where they run: somebody has to go there.
std::string locate_ranks(const std::vector<int>& ranks, const std::vector<std::string>& places) {
  if (places.empty()) return name_ranks(ranks);
  std::vector<std::string> where;
  for (const int rank : ranks) {
    if (where.size() == kNamedPlaces) break;
    where.push_back(places.at(static_cast<size_t>(rank)));
  }
  return fmt::format("{} ({}{})", name_ranks(ranks), fmt::join(where, "; "),
                     ranks.size() > kNamedPlaces ? "; ..." : "");
}

const Flight* find_awaited(const FlightLog& log) {
  const auto found =
      std::find_if(log.flights.begin(), log.flights.end(),
                   [&](const Flight& flight) { return flight.number == log.awaited; });
  return log.awaited && found != log.flights.end() ? &*found : nullptr;
}

const Flight* find_call(const FlightLog& log, const Flight& pivot) {
  const auto found =
      std::find_if(log.flights.begin(), log.flights.end(), [&](const Flight& flight) {
        return flight.group == pivot.group && flight.group_number == pivot.group_number;
      });
  return found == log.flights.end() ? nullptr : &*found;
}

// Ranks of the pivot's group that have not come to it.
std::vector<const FlightLog*> find_behind(const std::vector<FlightLog>& logs, const Flight& pivot) {
  std::vector<const FlightLog*> behind;
  for (const FlightLog& log : logs) {
    const auto group = log.groups.find(pivot.group);
    if (group != log.groups.end() && group->second < pivot.group_number) behind.push_back(&log);
  }
  return behind;
}

// The collective that holds up the first rank that is held up; where the rank that is behind there
// is itself held up elsewhere, that one, and so on.
const Flight* find_pivot(const std::vector<FlightLog>& logs) {
  const Flight* pivot = nullptr;
  for (const FlightLog& log : logs) {
    if (!pivot) pivot = find_awaited(log);
  }
  std::set<const Flight*> seen;
  while (pivot && seen.insert(pivot).second) {
    const auto behind = find_behind(logs, *pivot);
    const bool all_wait =
        !behind.empty() && std::all_of(behind.begin(), behind.end(), [](const FlightLog* log) {
          return find_awaited(*log) != nullptr;
        });
    if (!all_wait) return pivot;
    const Flight* next = find_awaited(*behind.front());
    if (find_behind(logs, *next).empty()) return pivot;
    pivot = next;
  }
  return pivot;
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

// Empty where all that called it called the same.
std::string find_difference(const std::vector<FlightLog>& logs, const Flight& pivot) {
  std::map<std::string, std::vector<int>> calls;
  bool differ = false;
  for (const FlightLog& log : logs) {
    const Flight* call = find_call(log, pivot);
    if (!call) continue;
    calls[describe_call(*call)].push_back(log.rank);
    differ = differ || !is_same_call(*call, pivot);
  }
  if (!differ) return "";
  std::vector<std::string> parts;
  for (const auto& [call, ranks] : calls)
    parts.push_back(fmt::format("{} on {}", call, name_ranks(ranks)));
  return fmt::format("the ranks call different collectives: number {} of {} is {}",
                     pivot.group_number, pivot.group, fmt::join(parts, ", "));
}

std::string find_verdict(const std::vector<FlightLog>& logs, const std::vector<int>& silent,
                         const std::vector<std::string>& places) {
  const Flight* pivot = find_pivot(logs);
  if (pivot) {
    const std::string difference = find_difference(logs, *pivot);
    if (!difference.empty()) return difference;
  }
  if (!silent.empty()) {
    return fmt::format("{} give{} no sign of life: stopped, gone, or without a view of this folder",
                       locate_ranks(silent, places), silent.size() > 1 ? "" : "s");
  }
  if (!pivot) return "no rank is held up any more";
  std::vector<int> behind;
  for (const FlightLog* log : find_behind(logs, *pivot)) behind.push_back(log->rank);
  if (!behind.empty()) {
    return fmt::format("{} {} not come to {}", locate_ranks(behind, places),
                       behind.size() > 1 ? "have" : "has", describe(*pivot));
  }
  return fmt::format("all its ranks have come to {}: what they send does not arrive",
                     describe(*pivot));
}

// What a rank does, with {} in place of the time that it has been doing it.
struct Doing {
  std::string text;
  double seconds = 0;
};

Doing find_doing(const FlightLog& log) {
  if (const Flight* flight = find_awaited(log))
    return {"in " + describe(*flight) + " for {}", log.written - flight->started};
  if (log.flights.empty()) return {"before its first collective", 0};
  const Flight& last = log.flights.back();
  return {fmt::format("computing; {{}} ago {} {}", last.finished > 0 ? "finished" : "started",
                      describe(last)),
          log.written - std::max(last.started, last.finished)};
}

std::string with_time(std::string text, double least, double most) {
  const size_t place = text.find("{}");
  if (place == std::string::npos) return text;
  const std::string low = fmt::format("{:.0f}", least), high = fmt::format("{:.0f}", most);
  return text.replace(place, 2, low == high ? low + " s" : fmt::format("{} to {} s", low, high));
}

}  // namespace

std::string to_json(const FlightLog& log) {
  json flights = json::array();
  for (const Flight& f : log.flights) {
    flights.push_back({{"number", f.number},
                       {"group", f.group},
                       {"group_number", f.group_number},
                       {"operation", f.operation},
                       {"subject", f.subject},
                       {"bytes", f.bytes >= 0 ? json(f.bytes) : json()},
                       {"state", kStates[static_cast<size_t>(f.state)]},
                       {"started", f.started},
                       {"finished", f.finished > 0 ? json(f.finished) : json()}});
  }
  const json text = {
      {"rank", log.rank},       {"ranks", log.ranks},
      {"written", log.written}, {"awaited", log.awaited ? json(*log.awaited) : json()},
      {"groups", log.groups},   {"collectives", std::move(flights)}};
  return text.dump(1) + "\n";
}

FlightLog parse_flight_log(const std::string& text, const std::string& where) {
  try {
    const json value = parse_json(text, where);
    FlightLog log;
    log.rank = value.at("rank");
    log.ranks = value.at("ranks");
    log.written = value.at("written");
    if (!value.at("awaited").is_null()) log.awaited = value.at("awaited").get<int64_t>();
    value.at("groups").get_to(log.groups);
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
  const Doing doing = find_doing(log);
  return with_time(doing.text, doing.seconds, doing.seconds);
}

std::string explain_standstill(std::vector<FlightLog> logs,
                               const std::vector<std::string>& places) {
  std::sort(logs.begin(), logs.end(),
            [](const FlightLog& a, const FlightLog& b) { return a.rank < b.rank; });
  std::vector<int> silent;
  for (int rank = 0; rank < logs.front().ranks; ++rank) {
    const bool present = std::any_of(logs.begin(), logs.end(),
                                     [&](const FlightLog& log) { return log.rank == rank; });
    if (!present) silent.push_back(rank);
  }
  struct Group {
    std::string text;
    double least, most;
    std::vector<int> ranks;
  };
  std::vector<Group> groups;  // in the order of ranks
  for (const FlightLog& log : logs) {
    const Doing doing = find_doing(log);
    auto found = std::find_if(groups.begin(), groups.end(),
                              [&](const Group& group) { return group.text == doing.text; });
    if (found == groups.end())
      found = groups.insert(groups.end(), {doing.text, doing.seconds, doing.seconds, {}});
    found->least = std::min(found->least, doing.seconds);
    found->most = std::max(found->most, doing.seconds);
    found->ranks.push_back(log.rank);
  }
  std::string report = find_verdict(logs, silent, places);
  for (const Group& group : groups)
    report += fmt::format("\n  {}: {}", name_ranks(group.ranks),
                          with_time(group.text, group.least, group.most));
  if (!silent.empty()) report += fmt::format("\n  {}: no flight record", name_ranks(silent));
  return report;
}

}  // namespace safegrad::dist
