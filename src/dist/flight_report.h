// flight_report.h: what the flight records of all ranks say together about a job that stands still.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "dist/flight_record.h"

namespace safegrad::dist {

/// What one rank leaves behind in rank-N.json.
struct FlightLog {
  int rank = 0, ranks = 1;
  double written = 0;                     ///< seconds since 1970
  std::optional<int64_t> awaited;         ///< number of the collective that holds the rank up
  std::map<std::string, int64_t> groups;  ///< the last group_number of each, also of older flights
  std::vector<Flight> flights;            ///< oldest first
};

std::string to_json(const FlightLog& log);
/// Throws InputError (`where` and what is wrong).
FlightLog parse_flight_log(const std::string& text, const std::string& where);

/// What one rank does: in which collective, for how long; or since when it computes.
std::string explain_rank(const FlightLog& log);
/// Which rank is behind and in what: a verdict, then a line for what ranks do, a line for all that
/// do the same. Ranks without a log among `logs` count as silent. `logs` is not empty; any order.
/// `places[r]`: where rank r runs, for people; may be empty.
std::string explain_standstill(std::vector<FlightLog> logs, const std::vector<std::string>& places);

}  // namespace safegrad::dist
