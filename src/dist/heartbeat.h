// heartbeat.h: signs of life of a thread that works on files, for the day that a disk does not
// answer.
#pragma once
#include <cstdint>
#include <mutex>
#include <string>

namespace safegrad::dist {

/// One thread beats; any may read. A thread that hangs in the system cannot be asked and cannot be
/// ended: what it was at must be known before.
class Heartbeat {
 public:
  /// The thread begins `what` ("writing FILE"), or has got on with it by a piece.
  void beat(const std::string& what);
  void rest();  ///< it has nothing to do

  struct Now {
    int64_t beats = 0;  ///< another number: it has got on
    std::string what;   ///< empty: nothing to do
  };
  Now now() const;

 private:
  mutable std::mutex mutex_;
  Now now_;
};

}  // namespace safegrad::dist
