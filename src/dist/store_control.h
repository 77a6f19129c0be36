// store_control.h: a control plane through a key-value store, for ranks that MPI did not start.
#pragma once
#include <chrono>
#include <memory>
#include <string>

#include <c10/util/intrusive_ptr.h>

#include "dist/control_plane.h"

namespace c10d {
class Store;
}

namespace safegrad::dist {

/// Where the ranks of a group meet.
struct StoreGroup {
  c10::intrusive_ptr<c10d::Store> store;  ///< one client a rank
  std::string prefix;                     ///< of the group's keys, the same on all its ranks
  int rank, size;
};

/// Does not communicate; the first exchange shows whether everybody is there. In an exchange every
/// rank sets a key and rank 0 publishes them together: O(size) requests in all. A rank that has not
/// arrived after `deadline` is named by a CommError, with the operation and the exchange's number
/// in the group.
std::unique_ptr<ControlPlane> make_store_control(StoreGroup group,
                                                 std::chrono::milliseconds deadline);

}  // namespace safegrad::dist
