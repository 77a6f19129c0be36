#include "cpu/allocation_count.h"

#include <atomic>
#include <new>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/alignment.h>

namespace safegrad {
namespace {

// Tensors may outlive the counter: what they take off is shared with it.
struct Totals {
  std::atomic<int64_t> bytes = 0, peak = 0;

  void add(int64_t n) {
    const int64_t now = bytes += n;
    int64_t most = peak;
    while (now > most && !peak.compare_exchange_weak(most, now)) {
    }
  }
};

// Lies before the data, which then is as aligned as LibTorch's own: a library that asks for a plain
// pointer (oneDNN does) gives no more than that back.
struct alignas(c10::gAlignment) Header {
  std::shared_ptr<Totals> totals;
  int64_t bytes;
  c10::DeleterFnPtr free;
};

void release(void* data) {
  if (!data) return;
  Header* header = static_cast<Header*>(data) - 1;
  header->totals->bytes -= header->bytes;
  const c10::DeleterFnPtr free = header->free;
  header->~Header();
  free(header);
}

}  // namespace

class AllocationCount::Counter final : public c10::Allocator {
 public:
  explicit Counter(c10::Allocator* inner) : inner_(inner) {}

  c10::DataPtr allocate(size_t n) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (n == 0) return {nullptr, nullptr, release, cpu};
    void* memory = inner_->raw_allocate(sizeof(Header) + n);
    auto* header = new (memory) Header{totals_, static_cast<int64_t>(n), inner_->raw_deleter()};
    totals_->add(header->bytes);
    void* data = header + 1;
    return {data, data, release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }

  c10::Allocator* inner() const { return inner_; }
  Totals& totals() const { return *totals_; }

 private:
  c10::Allocator* inner_;
  std::shared_ptr<Totals> totals_ = std::make_shared<Totals>();
};

AllocationCount::AllocationCount()
    : counter_(std::make_unique<Counter>(c10::GetAllocator(c10::DeviceType::CPU))) {
  c10::SetAllocator(c10::DeviceType::CPU, counter_.get(), /*priority=*/0xFF);
}

AllocationCount::~AllocationCount() {
  c10::SetAllocator(c10::DeviceType::CPU, counter_->inner(), /*priority=*/0xFF);
}

int64_t AllocationCount::bytes() const {
  return counter_->totals().bytes;
}

int64_t AllocationCount::take_peak() {
  Totals& totals = counter_->totals();
  return totals.peak.exchange(totals.bytes);
}

}  // namespace safegrad
