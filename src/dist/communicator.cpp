#include "dist/communicator.h"

namespace safegrad::dist {

void Communicator::count(const std::string& name, int64_t bytes) {
  Traffic& t = traffic_[name];
  t.calls += 1;
  t.bytes += bytes;
}

}  // namespace safegrad::dist
