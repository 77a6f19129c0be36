// stop_signal.h: how somebody outside asks this process to end in good order.
#pragma once

namespace safegrad {

/// From here on the first SIGTERM or SIGUSR1 is remembered; whichever comes next ends the process
/// at once, as if nothing had been installed.
void catch_stop_signals();
bool stop_requested();

}  // namespace safegrad
