// backend.h: a kind of device, as the engine and the models see it.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/kernels.h"

namespace safegrad {

/// Charges a device's time to one phase at a time.
class Stopwatch {
 public:
  virtual ~Stopwatch() = default;
  /// What is enqueued from now on belongs to `phase`. Does not block.
  virtual void enter(size_t phase) = 0;
  /// Seconds by phase since the last take, of what the device has finished; the rest is in the
  /// next. Does not block.
  virtual std::vector<double> take() = 0;
};

/// The device of this rank: its memory, its kernels, its clock. One a process, and it outlives what
/// was made with it.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual at::Device device() const = 0;
  /// For people: "cpu", or the card's name.
  virtual std::string name() const = 0;
  virtual const Kernels& kernels() const = 0;

  /// A host tensor's contents on the device; `host` itself where that is the host. The copy is
  /// enqueued; `host` may be let go at once.
  virtual at::Tensor upload(const at::Tensor& host) const = 0;
  virtual std::unique_ptr<Stopwatch> make_stopwatch(size_t phases) const = 0;
  /// Floating-point operations per second of a large square product in `dtype`: the best of several
  /// runs, about half a second in all. The denominator of "speed of light" (design §2).
  virtual double measure_gemm_rate(at::ScalarType dtype) const = 0;
  /// Most device memory that tensors have held at a time since the last call, in bytes; 0 where
  /// that is not counted (on the host). What a communicator registers with the network is not in
  /// it.
  virtual int64_t take_peak_bytes() const = 0;
  /// Most memory that this rank has held at a time so far, in bytes: on a GPU its tensors (since
  /// take_peak_bytes, if that was called), on the host the whole process; 0 where the system does
  /// not say.
  virtual int64_t peak_bytes() const = 0;
};

}  // namespace safegrad
