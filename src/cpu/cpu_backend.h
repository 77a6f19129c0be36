// cpu_backend.h: this machine's cores as a device.
#pragma once
#include "core/backend.h"

namespace safegrad {

/// The one instance; it has no state. Its calls run at once, its clock is the wall's.
const Backend& cpu_backend();

}  // namespace safegrad
