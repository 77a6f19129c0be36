#include "cuda/nccl_link.h"

#include <cstdlib>
#include <exception>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

#include "core/error.h"

namespace safegrad::cuda {
namespace {

using Clock = std::chrono::steady_clock;
using c10::cuda::CUDAEvent;
using c10::cuda::CUDAGuard;

// Gathers, reductions and scalars of several groups share a device, and their kernels wait for
// peers while they occupy it. Started in different orders on two ranks they could wait for each
// other for ever. NCCL (2.26 and later) can order the start of kernels of all communicators of a
// device by the order of the host's calls, which is the same on every rank here; they still overlap
// (CUDA 12.3). NCCL reads the variable once. What the user has set stands.
void order_launches() {
  setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", /*overwrite=*/0);
}

std::string to_hex(const ncclUniqueId& id) {
  std::string text;
  for (const char byte : id.internal)
    text += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  return text;
}

ncclUniqueId from_hex(const std::string& text) {
  ncclUniqueId id{};
  SAFEGRAD_CHECK(text.size() == 2 * sizeof(id.internal), CommError,
                 "rank 0 sent an NCCL id of {} characters, {} were due", text.size(),
                 2 * sizeof(id.internal));
  for (size_t i = 0; i < sizeof(id.internal); ++i)
    id.internal[i] = static_cast<char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  return id;
}

ncclDataType_t type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return ncclFloat32;
    case at::kBFloat16:
      return ncclBfloat16;
    case at::kHalf:
      return ncclFloat16;
    case at::kDouble:
      return ncclFloat64;
    default:
      throw UsageError(fmt::format("NCCL does not add {} here", c10::toString(t.scalar_type())));
  }
}

// The host's pause between two looks: short at first, since what is enqueued is soon under way.
class Pause {
 public:
  void take() {
    if (++taken_ < 1000) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  int taken_ = 0;
};

}  // namespace

// The communicator, and what is registered with it. Buffers share it, so that whichever goes first
// finds out.
struct NcclLink::Registry {
  struct Entry {
    ncclWindow_t window = nullptr;
    void* handle = nullptr;
  };
  ncclComm_t comm = nullptr;
  std::map<void*, Entry> entries;

  void forget(void* memory) {
    const auto found = entries.find(memory);
    if (found == entries.end()) return;
    const Entry entry = found->second;
    entries.erase(found);
    if (!comm) return;
    if (entry.window) ncclCommWindowDeregister(comm, entry.window);
    if (entry.handle) ncclCommDeregister(comm, entry.handle);
  }
};

struct NcclLink::Family {
  bool failed = false;
  std::vector<NcclLink*> links;
};

NcclLink::NcclLink(int rank, int size, c10::DeviceIndex device, NcclOptions options,
                   std::shared_ptr<Family> family)
    : rank_(rank),
      size_(size),
      device_(device),
      options_(options),
      stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device)),
      family_(std::move(family)),
      registry_(std::make_shared<Registry>()) {
  family_->links.push_back(this);
}

NcclLink::NcclLink(dist::ControlPlane& control, int device, NcclOptions options)
    : NcclLink(control.rank(), control.size(), static_cast<c10::DeviceIndex>(device), options,
               std::make_shared<Family>()) {
  order_launches();
  const CUDAGuard guard(device_);
  ncclUniqueId id{};
  if (rank_ == 0) accept(ncclGetUniqueId(&id), "ncclGetUniqueId");
  id = from_hex(control.broadcast(rank_ == 0 ? to_hex(id) : "", 0));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;  // a rank that never comes must not keep this one for ever
  accept(ncclCommInitRankConfig(&registry_->comm, size_, id, rank_, &config), "connecting NCCL");
  await_ready("connecting NCCL");
}

std::unique_ptr<NcclLink> NcclLink::split(int colour, int rank, int size) {
  const CUDAGuard guard(device_);
  is_ready("splitting NCCL");
  ncclComm_t part = nullptr;
  const int nccl_colour = colour == kNone ? NCCL_SPLIT_NOCOLOR : colour;
  accept(ncclCommSplit(registry_->comm, nccl_colour, rank_, &part, /*config=*/nullptr),
         "splitting NCCL");
  await_ready("splitting NCCL");  // `part` is written by then
  if (colour == kNone) return nullptr;
  auto link = std::unique_ptr<NcclLink>(new NcclLink(rank, size, device_, options_, family_));
  link->registry_->comm = part;
  link->await_ready("splitting NCCL");
  return link;
}

NcclLink::~NcclLink() {
  ncclComm_t& comm = registry_->comm;
  // While an exception passes, peers may be in a collective that this rank no longer enters.
  if (family_->failed || std::uncaught_exceptions() > 0) {
    abort();
  } else if (comm) {
    try {
      const CUDAGuard guard(device_);
      while (!registry_->entries.empty()) registry_->forget(registry_->entries.begin()->first);
      accept(ncclCommFinalize(comm), "ncclCommFinalize");
      await_ready("ncclCommFinalize");
      ncclCommDestroy(std::exchange(comm, nullptr));
    } catch (const std::exception&) {
      abort();  // a job that has got this far has its results
    }
  }
  std::erase(family_->links, this);
}

void NcclLink::abort() noexcept {
  registry_->entries.clear();
  if (registry_->comm) ncclCommAbort(std::exchange(registry_->comm, nullptr));
}

void NcclLink::fail(const char* operation, const std::string& why) {
  family_->failed = true;
  for (NcclLink* link : family_->links) link->abort();
  throw CommError(
      fmt::format("rank {} of {} (GPU {}): {}: {}", rank_, size_, device_, operation, why));
}

// Codes are int in the header, which does not see NCCL's.
void NcclLink::accept(int code, const char* operation) {
  if (code == ncclSuccess || code == ncclInProgress) return;
  std::string text = ncclGetErrorString(static_cast<ncclResult_t>(code));
  const char* last = ncclGetLastError(registry_->comm);
  if (last && *last) text += fmt::format(" ({})", last);
  fail(operation, text);
}

bool NcclLink::is_ready(const char* operation) {
  SAFEGRAD_CHECK(registry_->comm, CommError,
                 "rank {} of {} (GPU {}): {}: NCCL was aborted after an earlier failure", rank_,
                 size_, device_, operation);
  ncclResult_t state = ncclSuccess;
  accept(ncclCommGetAsyncError(registry_->comm, &state), operation);
  accept(state, operation);
  return state == ncclSuccess;
}

void NcclLink::await_ready(const char* operation) {
  const auto end = Clock::now() + options_.deadline;
  for (Pause pause; !is_ready(operation); pause.take()) {
    if (Clock::now() > end) {
      fail(operation, fmt::format("not all ranks were there within {:g} s",
                                  std::chrono::duration<double>(options_.deadline).count()));
    }
  }
}

void NcclLink::await(const CUDAEvent& event, const char* operation) {
  const auto end = Clock::now() + options_.deadline;
  for (Pause pause; !event.query(); pause.take()) {
    for (NcclLink* link : family_->links) link->is_ready(operation);
    if (Clock::now() > end) {
      fail(operation, fmt::format("not finished within {:g} s: a rank has not come to it",
                                  std::chrono::duration<double>(options_.deadline).count()));
    }
  }
}

at::Tensor NcclLink::allocate(int64_t numel, at::ScalarType dtype) {
  const CUDAGuard guard(device_);
  const size_t bytes = static_cast<size_t>(numel) * c10::elementSize(dtype);
  is_ready("ncclMemAlloc");
  void* memory = nullptr;
  accept(ncclMemAlloc(&memory, bytes), "ncclMemAlloc");
  const auto registry = registry_;
  const at::Device device(at::kCUDA, device_);
  // LibTorch's allocator does not know this memory: nobody else waits for its last use. In a job
  // that fails that may never come; its memory goes with the process.
  const at::Tensor buffer = at::from_blob(
      memory, {numel},
      [registry, memory](void*) {
        if (std::uncaught_exceptions() > 0 || cudaDeviceSynchronize() != cudaSuccess) return;
        registry->forget(memory);
        ncclMemFree(memory);
      },
      at::TensorOptions().dtype(dtype).device(device), device);
  Registry::Entry& entry = registry->entries[memory];
  accept(
      ncclCommWindowRegister(registry->comm, memory, bytes, &entry.window, NCCL_WIN_COLL_SYMMETRIC),
      "ncclCommWindowRegister");
  await_ready("ncclCommWindowRegister");
  // No window: this NCCL or this network has none. Where it cannot register either, it copies.
  if (!entry.window) {
    accept(ncclCommRegister(registry->comm, memory, bytes, &entry.handle), "ncclCommRegister");
    await_ready("ncclCommRegister");
  }
  return buffer;
}

CUDAEvent NcclLink::enqueue(const char* operation, const std::function<int()>& call) {
  const CUDAGuard guard(device_);
  is_ready(operation);
  CUDAEvent before, after;
  before.record(c10::cuda::getCurrentCUDAStream(device_));
  before.block(stream_);
  accept(call(), operation);
  // A thread of NCCL's enqueues; until it has, nothing else may go on the stream.
  await_ready(operation);
  after.record(stream_);
  return after;
}

CUDAEvent NcclLink::all_gather(const at::Tensor& full, const at::Tensor& shard) {
  return enqueue("all_gather", [&] {
    return ncclAllGather(shard.const_data_ptr(), full.mutable_data_ptr(), shard.nbytes(), ncclUint8,
                         registry_->comm, stream_);
  });
}

CUDAEvent NcclLink::reduce_scatter(const at::Tensor& shard, const at::Tensor& full) {
  return enqueue("reduce_scatter", [&] {
    return ncclReduceScatter(full.const_data_ptr(), shard.mutable_data_ptr(),
                             static_cast<size_t>(shard.numel()), type_of(shard), ncclSum,
                             registry_->comm, stream_);
  });
}

CUDAEvent NcclLink::all_reduce(const at::Tensor& t) {
  return enqueue("all_reduce", [&] {
    return ncclAllReduce(t.const_data_ptr(), t.mutable_data_ptr(), static_cast<size_t>(t.numel()),
                         type_of(t), ncclSum, registry_->comm, stream_);
  });
}

}  // namespace safegrad::cuda
