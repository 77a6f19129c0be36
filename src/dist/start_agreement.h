// start_agreement.h: whether all ranks of a job were given the same things, before they do anything
// with them.
#pragma once
#include <string>
#include <vector>

#include "dist/control_plane.h"

namespace safegrad::dist {

/// Something that a rank was given or has found: a version, a config value, a file's fingerprint.
struct Fact {
  std::string name, value;
  bool may_differ = false;  ///< a difference is worth a warning and does no harm
};

/// "0-2, 5" for ascending ranks.
std::string list_ranks(const std::vector<int>& ranks);

/// Compares the ranks' facts by name; a name that only some have differs. In the good case two
/// words of each rank are exchanged. Else one rank of each opinion tells its facts (of the first
/// eight), and JobFailed leaves on all ranks with every difference ("optimizer.lr: 0.001 on ranks
/// 0-2; 0.1 on rank 3") and exit code 1. Differences that may be end in `warnings`, the same on all
/// ranks. Collective.
void check_same_start(ControlPlane& control, const std::vector<Fact>& facts,
                      std::vector<std::string>& warnings);

}  // namespace safegrad::dist
