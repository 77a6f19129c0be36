#include "dist/heartbeat.h"

namespace safegrad::dist {

void Heartbeat::beat(const std::string& what) {
  const std::lock_guard lock(mutex_);
  ++now_.beats;
  now_.what = what;
}

void Heartbeat::rest() {
  beat("");
}

Heartbeat::Now Heartbeat::now() const {
  const std::lock_guard lock(mutex_);
  return now_;
}

}  // namespace safegrad::dist
