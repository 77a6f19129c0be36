#include "cuda/event_stopwatch.h"

#include <c10/cuda/CUDAStream.h>

#include "cuda/check.h"

namespace safegrad::cuda {

EventStopwatch::EventStopwatch(size_t phases) : phases_(phases) {}

EventStopwatch::~EventStopwatch() {
  for (const Mark& mark : marks_) cudaEventDestroy(mark.event);
  for (cudaEvent_t event : free_) cudaEventDestroy(event);
}

cudaEvent_t EventStopwatch::free_event() {
  cudaEvent_t event = nullptr;
  if (free_.empty()) {
    check(cudaEventCreate(&event), "cudaEventCreate");
  } else {
    event = free_.back();
    free_.pop_back();
  }
  return event;
}

void EventStopwatch::enter(size_t phase) {
  const cudaEvent_t event = free_event();
  check(cudaEventRecord(event, c10::cuda::getCurrentCUDAStream()), "cudaEventRecord");
  marks_.push_back({phase, event});
}

std::vector<double> EventStopwatch::take() {
  std::vector<double> seconds(phases_, 0.0);
  while (marks_.size() > 1) {
    const cudaError_t passed = cudaEventQuery(marks_[1].event);
    if (passed == cudaErrorNotReady) {
      cudaGetLastError();  // an answer, no failure: LibTorch would find it at its next launch
      break;
    }
    check(passed, "cudaEventQuery");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, marks_[0].event, marks_[1].event),
          "cudaEventElapsedTime");
    seconds[marks_[0].phase] += static_cast<double>(milliseconds) * 1e-3;
    free_.push_back(marks_.front().event);
    marks_.pop_front();
  }
  return seconds;
}

}  // namespace safegrad::cuda
