// watched_communicator.h: enters every collective into a flight record.
#pragma once
#include <memory>
#include <string>

#include "dist/communicator.h"
#include "dist/flight_record.h"

namespace safegrad::dist {

/// Hands everything to `inner`, and has `record`, which outlives it, know of it. `group` names the
/// ranks: the same text on all of them, and another one for ranks that other collectives connect.
std::unique_ptr<ControlPlane> watch(std::unique_ptr<ControlPlane> inner, FlightRecord& record,
                                    std::string group);
std::unique_ptr<Communicator> watch(std::unique_ptr<Communicator> inner, FlightRecord& record,
                                    std::string group);

}  // namespace safegrad::dist
