#include "dist/flight_record.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace safegrad::dist {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

Flight* FlightRecord::find(int64_t number) {
  if (number > last_ || number + static_cast<int64_t>(kKept) <= last_) return nullptr;
  return &ring_[static_cast<size_t>(number - 1) % kKept];
}

int64_t FlightRecord::begin(Flight flight) {
  flight.started = seconds_now();
  const std::lock_guard lock(mutex_);
  flight.number = ++last_;
  last_of_groups_[flight.group] = flight.group_number;
  const size_t place = static_cast<size_t>(last_ - 1) % kKept;
  if (place == ring_.size()) {
    ring_.push_back(std::move(flight));
  } else {
    ring_[place] = std::move(flight);
  }
  return last_;
}

void FlightRecord::await(int64_t number) {
  const std::lock_guard lock(mutex_);
  awaited_.push_back(number);
  if (Flight* flight = find(number)) flight->state = Flight::State::awaited;
}

void FlightRecord::go_on(int64_t number) {
  const std::lock_guard lock(mutex_);
  std::erase(awaited_, number);
  if (Flight* flight = find(number)) flight->state = Flight::State::started;
}

void FlightRecord::finish(int64_t number) {
  const double now = seconds_now();
  const std::lock_guard lock(mutex_);
  std::erase(awaited_, number);
  if (Flight* flight = find(number)) {
    flight->state = Flight::State::finished;
    flight->finished = now;
  }
}

FlightRecord::Now FlightRecord::now() const {
  const std::lock_guard lock(mutex_);
  if (awaited_.empty()) return {last_, {}};
  return {last_, awaited_.front()};
}

std::map<std::string, int64_t> FlightRecord::last_of_groups() const {
  const std::lock_guard lock(mutex_);
  return last_of_groups_;
}

std::vector<Flight> FlightRecord::recent() const {
  const std::lock_guard lock(mutex_);
  std::vector<Flight> flights = ring_;
  std::sort(flights.begin(), flights.end(),
            [](const Flight& a, const Flight& b) { return a.number < b.number; });
  return flights;
}

}  // namespace safegrad::dist
