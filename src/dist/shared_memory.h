// shared_memory.h: one block of memory that all ranks of a machine see.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>

#include "dist/control_plane.h"

namespace safegrad::dist {

/// `bytes` of zeroed memory that every rank of `ranks` maps, each at an address of its own; null on
/// every rank where they cannot all map it (several machines, containers that hide their processes
/// from each other). It is not in /dev/shm, whose size does not bound it, and goes away with its
/// last user. Collective.
std::shared_ptr<std::byte> map_shared_memory(ControlPlane& ranks, size_t bytes);

/// The same as a flat CPU tensor of `numel` > 0 elements; undefined in place of null.
at::Tensor allocate_shared(ControlPlane& ranks, int64_t numel, at::ScalarType dtype);

}  // namespace safegrad::dist
