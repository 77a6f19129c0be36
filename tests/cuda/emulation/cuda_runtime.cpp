#include "cuda_runtime.h"

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <link.h>
#include <ucontext.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kLanes = 32;

enum class State { ready, at_barrier, at_shuffle, finished };

// A fiber lives on: it runs one thread of every block. Its first switch is a context's, all others
// are jumps, which save no signal mask: a system call each would be most of the time.
struct Fiber {
  std::vector<std::byte> stack = std::vector<std::byte>(kStackBytes);
  bool started = false;
  jmp_buf resume;
  State state;
  std::source_location place;  // where it waits
  // What it shows to its warp. Two, in turn: a lane may show the next word while others have not
  // yet read this one, but no lane is two ahead.
  uint32_t words[2];
  unsigned shown;
};

bool same(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string name(const std::source_location& place) {
  return std::string(place.file_name()) + ":" + std::to_string(place.line());
}

std::vector<unsigned> in_order(Order order, unsigned n) {
  std::vector<unsigned> result(n);
  std::iota(result.begin(), result.end(), 0u);
  if (order == Order::reversed) std::reverse(result.begin(), result.end());
  if (order == Order::shuffled) std::shuffle(result.begin(), result.end(), std::mt19937(43));
  return result;
}

// The thread_local variables of the library that holds an address: its kernels' shared memory.
struct SharedMemory {
  const void* kernel;
  std::byte* begin = nullptr;
  size_t bytes = 0;
};

int find_shared_memory(dl_phdr_info* library, size_t, void* out) {
  auto* found = static_cast<SharedMemory*>(out);
  const auto address = reinterpret_cast<ElfW(Addr)>(found->kernel);
  bool here = false;
  size_t bytes = 0;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = library->dlpi_phdr[i];
    const ElfW(Addr) begin = library->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD) here |= begin <= address && address < begin + part.p_memsz;
    if (part.p_type == PT_TLS) bytes = part.p_memsz;
  }
  if (!here) return 0;
  found->begin = static_cast<std::byte*>(library->dlpi_tls_data);
  found->bytes = bytes;
  return 1;
}

// One process runs one kernel at a time; fibers find their block here.
class Machine {
 public:
  Order thread_order = Order::forward, block_order = Order::forward;
  int64_t launches = 0;

  void run(const cudaLaunchConfig_t& config, const void* kernel,
           const std::function<void()>& thread) {
    SharedMemory shared{kernel};
    dl_iterate_phdr(find_shared_memory, &shared);
    thread_ = &thread;
    blockDim = config.blockDim;
    gridDim = config.gridDim;
    while (fibers_.size() < blockDim.x) fibers_.emplace_back(std::make_unique<Fiber>());
    const std::vector<unsigned> threads = in_order(thread_order, blockDim.x);
    for (unsigned block : in_order(block_order, gridDim.x)) {
      blockIdx = {block, 0, 0};
      if (shared.begin != nullptr) std::memset(shared.begin, 0xFF, shared.bytes);
      run_block(threads);
    }
  }

  void wait(State state, const std::source_location& place) {
    Fiber& fiber = current();
    fiber.state = state;
    fiber.place = place;
    leave(fiber);
  }

  // Ends the launch with an error; exceptions cannot leave a fiber.
  void refuse(const std::string& what) {
    refused_ = what;
    leave(current());
  }

  uint32_t exchange(uint32_t word, unsigned from, const std::source_location& place) {
    Fiber& fiber = current();
    const unsigned slot = fiber.shown++ % 2, warp = threadIdx.x - threadIdx.x % kLanes;
    fiber.words[slot] = word;
    wait(State::at_shuffle, place);
    return fibers_[warp + from]->words[slot];
  }

 private:
  Fiber& current() { return *fibers_[threadIdx.x]; }

  static void enter();

  [[noreturn]] void live() {
    for (;;) {
      (*thread_)();
      leave(current());
    }
  }

  // From a fiber to the scheduler; returns when the fiber goes on.
  void leave(Fiber& fiber) {
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
  }

  // From the scheduler to a fiber; returns when the fiber leaves.
  void go_on(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&context, &Machine::enter, 0);
    setcontext(&context);
  }

  // Every warp runs as far as it can before the next one does: the largest lead that a GPU could
  // give it, so that a missing barrier shows.
  void run_block(const std::vector<unsigned>& threads) {
    std::vector<std::vector<unsigned>> warps;  // in the order of their first threads
    std::vector<size_t> place((threads.size() + kLanes - 1) / kLanes, SIZE_MAX);
    for (unsigned t : threads) {
      fibers_[t]->state = State::ready;
      fibers_[t]->shown = 0;
      size_t& warp = place[t / kLanes];
      if (warp == SIZE_MAX) {
        warp = warps.size();
        warps.emplace_back();
      }
      warps[warp].push_back(t);
    }
    for (;;) {
      for (const std::vector<unsigned>& warp : warps) run_warp(warp);
      if (all_in(State::finished, threads)) return;
      if (!all_at(State::at_barrier, threads)) fail("threads wait for others that do not come");
      for (unsigned t : threads) fibers_[t]->state = State::ready;
    }
  }

  // Up to a barrier, or to the end. Lanes that miss a shuffle leave the others there.
  void run_warp(const std::vector<unsigned>& lanes) {
    for (;;) {
      for (unsigned t : lanes) {
        Fiber& fiber = *fibers_[t];
        if (fiber.state != State::ready) continue;
        threadIdx = {t, 0, 0};
        fiber.state = State::finished;  // unless it waits before it returns
        go_on(fiber);
        if (!refused_.empty()) fail(std::exchange(refused_, {}));
      }
      if (lanes.size() < kLanes || !all_at(State::at_shuffle, lanes)) return;
      for (unsigned t : lanes) fibers_[t]->state = State::ready;
    }
  }

  bool all_in(State state, const std::vector<unsigned>& threads) const {
    return std::all_of(threads.begin(), threads.end(),
                       [&](unsigned t) { return fibers_[t]->state == state; });
  }

  bool all_at(State state, const std::vector<unsigned>& threads) const {
    const std::source_location& place = fibers_[threads[0]]->place;
    return all_in(state, threads) && std::all_of(threads.begin(), threads.end(), [&](unsigned t) {
             return same(fibers_[t]->place, place);
           });
  }

  [[noreturn]] void fail(const std::string& what) {
    std::string message = what + ": block " + std::to_string(blockIdx.x);
    for (State state : {State::at_barrier, State::at_shuffle, State::finished}) {
      int64_t count = 0;
      std::string places;
      for (unsigned t = 0; t < blockDim.x; ++t) {
        if (fibers_[t]->state != state) continue;
        ++count;
        const std::string place = name(fibers_[t]->place);
        if (places.find(place) == std::string::npos) places += " " + place;
      }
      if (count == 0) continue;
      message += "; " + std::to_string(count);
      message += state == State::finished     ? " finished"
                 : state == State::at_barrier ? " at a barrier" + places
                                              : " at a shuffle" + places;
    }
    fibers_.clear();  // they are in the middle of a kernel
    throw std::logic_error(message);
  }

  const std::function<void()>* thread_ = nullptr;
  std::string refused_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

void Machine::enter() {
  machine().live();
}

}  // namespace

void set_order(Order threads, Order blocks) {
  machine().thread_order = threads;
  machine().block_order = blocks;
}

int64_t launches() {
  return machine().launches;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& thread) {
  const auto one_dimensional = [](const dim3& d) { return d.x >= 1 && d.y == 1 && d.z == 1; };
  if (!one_dimensional(config.gridDim) || !one_dimensional(config.blockDim) ||
      config.blockDim.x > 1024 || config.gridDim.x > 0x7FFFFFFFu || config.dynamicSmemBytes != 0) {
    return cudaErrorInvalidConfiguration;
  }
  ++machine().launches;
  machine().run(config, kernel, thread);
  return cudaSuccess;
}

void wait_for_block(std::source_location place) {
  machine().wait(State::at_barrier, place);
}

unsigned lane() {
  return threadIdx.x % kLanes;
}

uint32_t exchange(uint32_t word, unsigned from, std::source_location place) {
  return machine().exchange(word, from, place);
}

void check_mask(unsigned mask) {
  if (mask != 0xFFFFFFFFu) machine().refuse("shuffles of a part of a warp are not emulated");
}

}  // namespace emulation
