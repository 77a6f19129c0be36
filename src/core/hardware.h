// hardware.h: figures of devices and networks that a plan's times and limits come from.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace safegrad {

/// What one rank has. Rates are the maker's; `gemm_share` is what a step's products reach of them,
/// an assumption where it was not fitted to steps that were seen.
struct DeviceFigures {
  double memory_gib = 0;       ///< of a rank
  double reserve_gib = 0;      ///< not there for tensors: contexts, libraries, fragments
  double bfloat16_tflops = 0;  ///< dense
  double float32_tflops = 0;
  double tf32_tflops = 0;  ///< float32 products with `parallel.tf32`
  double gemm_share = 1;
  double memory_gb_per_s = 0;
  bool gpu = false;
  bool overlaps = false;        ///< collectives run during a unit's work
  int64_t ranks_per_node = 1;   ///< where the launcher puts so many side by side
  std::string inside, between;  ///< networks of a machine's ranks, and of machines
};

/// One rank's link, in one direction.
struct NetworkFigures {
  double gb_per_s = 0;    ///< nominal
  double share = 1;       ///< of that which collectives reach, an assumption where not measured
  double latency_us = 0;  ///< of a message from rank to rank
};

struct Hardware {
  std::map<std::string, DeviceFigures> devices;
  std::map<std::string, NetworkFigures> networks;

  /// Throw InputError with the names that there are.
  const DeviceFigures& device(const std::string& name) const;
  const NetworkFigures& network(const std::string& name) const;
};

/// a100, h100, h200, cpu; nvlink3, nvlink4, ib-200, ib-400, eth-100, shared-memory. Rates and
/// memory of cpu are 0: they are measured where a plan is made.
Hardware known_hardware();

/// Lays a YAML file over `hardware`: sections `devices` and `networks`, each a map of names to some
/// or all of the figures above; a new name needs its rates. Throws ConfigError: file, line, key.
void read_hardware(const std::string& path, Hardware& hardware);

}  // namespace safegrad
