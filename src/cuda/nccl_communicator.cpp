#include "cuda/nccl_communicator.h"

#include <utility>

#include <ATen/ATen.h>
#include <cuda_runtime_api.h>

#include "core/error.h"
#include "cuda/check.h"
#include "cuda/nccl_link.h"

namespace safegrad::cuda {
namespace {

using c10::cuda::CUDAEvent;
using dist::ControlPlane;
using dist::ShardMemory;
using dist::Work;

int64_t size_in_bytes(const at::Tensor& t) {
  return t.numel() * t.element_size();
}

class NoWork : public Work {
 public:
  void wait() override {}
};

// Holds the tensors until the current stream waits for the event: then whoever gets their memory
// next, on that stream, comes later.
class EventWork : public Work {
 public:
  EventWork(CUDAEvent event, at::Tensor a, at::Tensor b, c10::DeviceIndex device)
      : event_(std::move(event)), a_(std::move(a)), b_(std::move(b)), device_(device) {}
  ~EventWork() override {
    try {
      wait();
    } catch (const std::exception&) {
      // Only while the job is failing; nobody reads the result.
    }
  }

  void wait() override {
    if (!a_.defined()) return;
    event_.block(c10::cuda::getCurrentCUDAStream(device_));
    a_.reset();
    b_.reset();
  }

 private:
  CUDAEvent event_;
  at::Tensor a_, b_;
  c10::DeviceIndex device_;
};

// Two links, so that the next unit's gather overlaps the last one's reduction. Null on one rank.
struct Links {
  std::unique_ptr<NcclLink> gathers, reductions;
};

class Nccl final : public dist::Communicator {
 public:
  Nccl(std::unique_ptr<ControlPlane> control, c10::DeviceIndex device, Links links)
      : control_(std::move(control)), device_(device), links_(std::move(links)) {}

  int rank() const override { return control_->rank(); }
  int size() const override { return control_->size(); }

  ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) override {
    at::Tensor own = allocate(links_.gathers, numel, dtype);
    own.zero_();
    return {own, size() == 1 ? own : at::Tensor()};
  }
  void finish_shard_writes() override {}
  at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) override {
    return allocate(links_.gathers, numel, dtype);
  }
  at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) override {
    return allocate(links_.reductions, numel, dtype);
  }

  std::unique_ptr<Work> all_gather(at::Tensor full, at::Tensor shard) override {
    require(full.numel() == shard.numel() * size(), "all_gather", full, shard);
    count("all_gather", (size() - 1) * size_in_bytes(shard));
    if (!links_.gathers || shard.numel() == 0) return copy(full, shard);
    CUDAEvent done = links_.gathers->all_gather(full, shard);
    return std::make_unique<EventWork>(std::move(done), std::move(full), std::move(shard), device_);
  }

  std::unique_ptr<Work> reduce_scatter(at::Tensor shard, at::Tensor full) override {
    require(full.numel() == shard.numel() * size(), "reduce_scatter", full, shard);
    count("reduce_scatter", (size() - 1) * size_in_bytes(shard));
    if (!links_.reductions || shard.numel() == 0) return copy(shard, full);
    CUDAEvent done = links_.reductions->reduce_scatter(shard, full);
    return std::make_unique<EventWork>(std::move(done), std::move(shard), std::move(full), device_);
  }

  void all_reduce(at::Tensor t) override {
    require(true, "all_reduce", t, t);
    count("all_reduce", 2 * (size() - 1) * size_in_bytes(t) / size());
    if (!links_.reductions || t.numel() == 0) return;
    EventWork(links_.reductions->all_reduce(t), t, t, device_).wait();
  }

  std::vector<double> all_gather_scalars(const at::Tensor& values) override {
    require(values.scalar_type() == at::kDouble, "all_gather_scalars", values, values);
    count("scalars", (size() - 1) * size_in_bytes(values));
    const int64_t n = values.numel() * size();
    if (n == 0) return {};
    const at::Tensor host = links_.reductions ? gather_to_host(values, n) : values.cpu();
    const double* data = host.const_data_ptr<double>();
    return {data, data + n};
  }

  std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) override {
    count("scalars", static_cast<int64_t>((size() - 1) * words.size_bytes()));
    return control_->all_gather_words(words);
  }
  std::string broadcast(const std::string& text, int root) override {
    return control_->broadcast(text, root);
  }
  void barrier() override { control_->barrier(); }
  std::unique_ptr<ControlPlane> split_control(int colour) override {
    return control_->split_control(colour);
  }

  std::unique_ptr<dist::Communicator> split(int colour) override {
    auto part = control_->split_control(colour);
    Links links;
    if (size() > 1) {  // all ranks split, also those that stay alone and so need no link
      const int nccl_colour = part->size() > 1 ? colour : NcclLink::kNone;
      links.gathers = links_.gathers->split(nccl_colour, part->rank(), part->size());
      links.reductions = links_.reductions->split(nccl_colour, part->rank(), part->size());
    }
    return std::make_unique<Nccl>(std::move(part), device_, std::move(links));
  }

 private:
  at::Device device() const { return {at::kCUDA, device_}; }

  at::Tensor allocate(const std::unique_ptr<NcclLink>& link, int64_t numel, at::ScalarType dtype) {
    if (!link || numel == 0)
      return at::empty({numel}, at::TensorOptions().dtype(dtype).device(device()));
    return link->allocate(numel, dtype);
  }

  // On one rank a collective is a copy, on the current stream.
  static std::unique_ptr<Work> copy(const at::Tensor& to, const at::Tensor& from) {
    if (to.data_ptr() != from.data_ptr()) to.copy_(from, /*non_blocking=*/true);
    return std::make_unique<NoWork>();
  }

  // Behind the reductions, whose results the scalars are made of.
  at::Tensor gather_to_host(const at::Tensor& values, int64_t n) {
    if (!scalars_.defined() || scalars_.numel() < n) {
      scalars_ = at::empty({n}, values.options());
      pinned_ = at::empty({n}, at::TensorOptions().dtype(at::kDouble).pinned_memory(true));
    }
    const at::Tensor all = scalars_.narrow(0, 0, n);
    links_.reductions->all_gather(all, values);
    const c10::cuda::CUDAStream stream = links_.reductions->stream();
    check(cudaMemcpyAsync(pinned_.data_ptr(), all.const_data_ptr(),
                          static_cast<size_t>(size_in_bytes(all)), cudaMemcpyDeviceToHost, stream),
          "copying scalars to the host");
    CUDAEvent arrived;
    arrived.record(stream);
    links_.reductions->await(arrived, "all_gather of scalars");
    return pinned_;
  }

  void require(bool sizes_fit, const char* operation, const at::Tensor& a,
               const at::Tensor& b) const {
    SAFEGRAD_CHECK(sizes_fit, UsageError, "{}: {} elements do not fit {} a rank on {} ranks",
                   operation, a.numel(), b.numel(), size());
    SAFEGRAD_CHECK(
        a.is_contiguous() && b.is_contiguous() && a.dim() == 1 && b.dim() == 1 &&
            a.device() == device() && b.device() == device() && a.scalar_type() == b.scalar_type(),
        UsageError, "{}: needs flat contiguous tensors of one dtype on GPU {}", operation, device_);
  }

  std::unique_ptr<ControlPlane> control_;
  c10::DeviceIndex device_;
  Links links_;
  at::Tensor scalars_, pinned_;
};

}  // namespace

std::unique_ptr<dist::Communicator> make_nccl_world(std::unique_ptr<ControlPlane> control,
                                                    int device, NcclOptions options) {
  Links links;
  if (control->size() > 1) {
    links.gathers = std::make_unique<NcclLink>(*control, device, options);
    links.reductions = links.gathers->split(0, control->rank(), control->size());
  }
  return std::make_unique<Nccl>(std::move(control), static_cast<c10::DeviceIndex>(device),
                                std::move(links));
}

}  // namespace safegrad::cuda
