// stop_signal.h: how somebody outside asks this process to end in good order.
#pragma once

namespace safegrad {

/// From here on a SIGINT (Ctrl-C), SIGTERM or SIGUSR1 is remembered. One that comes a second later
/// or more ends the process at once, as if nothing had been installed; those between are the same
/// request, delivered again (a launcher forwards what the batch system also sends to each process).
void catch_stop_signals();
bool stop_requested();

}  // namespace safegrad
