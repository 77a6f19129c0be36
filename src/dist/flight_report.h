// flight_report.h: what the flight records of all ranks say together about a job that stands still.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dist/flight_record.h"

namespace safegrad::dist {

/// What one rank leaves behind in rank-N.json.
struct FlightLog {
  int rank = 0, ranks = 1;
  std::string host;
  int64_t pid = 0;
  double written = 0;              ///< seconds since 1970
  std::optional<int64_t> awaited;  ///< number of the collective that holds the rank up
  std::vector<Flight> flights;     ///< oldest first
};

std::string to_json(const FlightLog& log);
/// Throws InputError (`where` and what is wrong).
FlightLog parse_flight_log(const std::string& text, const std::string& where);

/// What one rank does: in which collective, for how long; or since when it computes.
std::string explain_rank(const FlightLog& log);
/// Which rank is behind and in what: a verdict, then a line for what each rank does. Ranks without
/// a log among `logs` count as silent. `logs` is not empty; any order.
std::string explain_standstill(std::vector<FlightLog> logs);

}  // namespace safegrad::dist
