// flight_record.h: the last collectives of this rank, kept for the day that one does not end.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace safegrad::dist {

/// One collective, as one rank saw it.
struct Flight {
  enum class State { started, awaited, finished };

  int64_t number = 0;        ///< of this rank, from 1
  std::string group;         ///< the ranks that take part
  int64_t group_number = 0;  ///< of this group, from 1: the same on all its ranks
  std::string operation;
  std::string subject;  ///< what it is about: a unit, a step; may be empty
  int64_t bytes = -1;   ///< of this rank's payload; -1 where ranks need not have the same
  State state = State::started;
  double started = 0, finished = 0;  ///< seconds since 1970; finished: 0 until it is
};

/// A ring of the last collectives. One thread writes; any may read. A collective costs two short
/// locks.
class FlightRecord {
 public:
  static constexpr size_t kKept = 256;

  /// The collective that `flight` describes has begun; number, state and times are filled in. The
  /// result names it below.
  int64_t begin(Flight flight);
  /// This rank does nothing else until it ends, or until go_on. An awaited one inside of another is
  /// part of it.
  void await(int64_t number);
  void go_on(int64_t number);
  void finish(int64_t number);

  /// What this rank does now.
  struct Now {
    int64_t last = 0;                ///< number of the last collective begun
    std::optional<int64_t> awaited;  ///< number of the one that holds this rank up
  };
  Now now() const;
  /// The last kKept, oldest first.
  std::vector<Flight> recent() const;
  /// The last group_number of every group, however long ago it was.
  std::map<std::string, int64_t> last_of_groups() const;

 private:
  Flight* find(int64_t number);

  mutable std::mutex mutex_;
  std::vector<Flight> ring_;  // number n lies at (n - 1) % kKept
  int64_t last_ = 0;
  std::vector<int64_t> awaited_;  // outermost first
  std::map<std::string, int64_t> last_of_groups_;
};

}  // namespace safegrad::dist
