// event_stopwatch.h: the time of a GPU's stream by phase, read without waiting for it.
#pragma once
#include <deque>
#include <vector>

#include <cuda_runtime_api.h>

#include "core/backend.h"

namespace safegrad::cuda {

/// Each enter() records an event on LibTorch's current stream. take() adds up what lies between
/// events that the GPU has passed; the rest stays for the next take().
class EventStopwatch final : public Stopwatch {
 public:
  explicit EventStopwatch(size_t phases);
  ~EventStopwatch() override;
  EventStopwatch(const EventStopwatch&) = delete;
  EventStopwatch& operator=(const EventStopwatch&) = delete;

  void enter(size_t phase) override;
  std::vector<double> take() override;

 private:
  struct Mark {
    size_t phase;
    cudaEvent_t event;
  };
  cudaEvent_t free_event();

  size_t phases_;
  std::deque<Mark> marks_;         // in the order of the stream
  std::vector<cudaEvent_t> free_;  // events are made once and used again
};

}  // namespace safegrad::cuda
