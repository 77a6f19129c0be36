// bench_collectives.cpp: time and bandwidth of each collective, through the interface that the
// trainer uses.
//
//   mpirun -n 2 build/bench_collectives --min-bytes 64KiB --max-bytes 64MiB --json
//
// Every result is checked; a wrong one ends the job with exit code 2.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <malloc.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "device.h"
#include "dist/job_failed.h"

namespace {

using namespace safegrad;

constexpr const char* kHelp =
    "Times all_gather, reduce_scatter and all_reduce of float32 tensors, and checks every result.\n"
    "The time of a repeat is the slowest rank's; the table has the median of the repeats. As in\n"
    "nccl-tests, with n ranks:\n"
    "  bytes   all_gather: of the output; reduce_scatter: of the input; all_reduce: of the tensor\n"
    "  algbw = bytes / time\n"
    "  busbw = algbw x (n-1)/n for all_gather and reduce_scatter, algbw x 2(n-1)/n for all_reduce\n"
    "GB/s are 1e9 bytes a second. Reductions read the engine's buffers, which ranks of one "
    "machine\n"
    "share over MPI; gathers travel in messages.\n"
    "Exit codes: 0 done, 1 a mistake in what was given, 2 a wrong result or a failure.";

struct Options {
  uint64_t min_bytes = 64 << 10, max_bytes = 64 << 20;
  int factor = 4, warmup = 2, repeats = 9;
  std::string backend = "mpi";
  bool json = false;
};

// Whole numbers, so that sums are exact in any order; neighbours and ranks differ.
at::Tensor values_of(int rank, int64_t begin, int64_t n, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  return (at::arange(begin, begin + n, options).remainder(1021) - 510).mul(rank + 1).to(at::kFloat);
}

at::Tensor sum_of_values(int ranks, int64_t begin, int64_t n, at::Device device) {
  return values_of(0, begin, n, device) * (ranks * (ranks + 1) / 2);
}

/// One collective at one size: its tensors, how to run it, and what it must give.
class Case {
 public:
  virtual ~Case() = default;
  virtual const char* name() const = 0;
  virtual double bus_factor(int ranks) const { return (ranks - 1.0) / ranks; }
  virtual void prepare() = 0;  ///< fills the input, spoils the output
  virtual void run() = 0;
  virtual bool is_right() const = 0;
};

class AllGather : public Case {
 public:
  AllGather(dist::Communicator& world, int64_t n, at::Device device) : world_(world) {
    const auto memory = world.allocate_shards(n, at::kFloat);
    // Where all ranks see all shards, a gather would move nothing.
    shard_ = memory.all.defined() ? at::empty_like(memory.own) : memory.own;
    full_ = world.allocate_gather_output(n * world.size(), at::kFloat);
    shard_.copy_(values_of(world.rank(), 0, n, device));
  }
  const char* name() const override { return "all_gather"; }
  void prepare() override { full_.fill_(std::numeric_limits<float>::quiet_NaN()); }
  void run() override { world_.all_gather(full_, shard_)->wait(); }
  bool is_right() const override {
    const int64_t n = shard_.numel();
    for (int r = 0; r < world_.size(); ++r) {
      if (!full_.narrow(0, r * n, n).equal(values_of(r, 0, n, full_.device()))) return false;
    }
    return true;
  }

 private:
  dist::Communicator& world_;
  at::Tensor shard_, full_;
};

class ReduceScatter : public Case {
 public:
  ReduceScatter(dist::Communicator& world, int64_t n, at::Device device)
      : world_(world),
        full_(world.allocate_reduce_input(n * world.size(), at::kFloat)),
        shard_(at::empty({n}, full_.options())) {
    full_.copy_(values_of(world.rank(), 0, full_.numel(), device));
  }
  const char* name() const override { return "reduce_scatter"; }
  void prepare() override { shard_.fill_(std::numeric_limits<float>::quiet_NaN()); }
  void run() override { world_.reduce_scatter(shard_, full_)->wait(); }
  bool is_right() const override {
    const int64_t n = shard_.numel();
    return shard_.equal(sum_of_values(world_.size(), world_.rank() * n, n, shard_.device()));
  }

 private:
  dist::Communicator& world_;
  at::Tensor full_, shard_;
};

class AllReduce : public Case {
 public:
  AllReduce(dist::Communicator& world, int64_t n, at::Device device)
      : world_(world), input_(values_of(world.rank(), 0, n, device)), t_(at::empty_like(input_)) {}
  const char* name() const override { return "all_reduce"; }
  double bus_factor(int ranks) const override { return 2 * (ranks - 1.0) / ranks; }
  void prepare() override { t_.copy_(input_); }
  void run() override { world_.all_reduce(t_); }
  bool is_right() const override {
    return t_.equal(sum_of_values(world_.size(), 0, t_.numel(), t_.device()));
  }

 private:
  dist::Communicator& world_;
  at::Tensor input_, t_;
};

struct Result {
  std::vector<double> seconds;  // sorted, the slowest rank's of each repeat
  bool right = true;            // on every rank, in every repeat
};

// All ranks are here, and their devices have done what they were told.
void meet(dist::Communicator& world, at::Device device) {
  world.all_gather_scalars(at::zeros({1}, at::TensorOptions().dtype(at::kDouble).device(device)));
}

Result measure(Case& collective, dist::Communicator& world, const Backend& backend,
               const Options& o) {
  Result result;
  uint64_t wrong = 0;
  const auto stopwatch = backend.make_stopwatch(2);
  for (int i = -o.warmup; i < o.repeats; ++i) {
    collective.prepare();
    meet(world, backend.device());
    stopwatch->take();
    stopwatch->enter(0);
    collective.run();
    stopwatch->enter(1);
    meet(world, backend.device());
    const double own = stopwatch->take()[0];
    const auto all = dist::all_gather_doubles(world, std::span(&own, 1));
    if (i >= 0) result.seconds.push_back(*std::max_element(all.begin(), all.end()));
    if (!collective.is_right()) ++wrong;
  }
  for (uint64_t w : world.all_gather_words(std::span(&wrong, 1))) result.right &= w == 0;
  std::sort(result.seconds.begin(), result.seconds.end());
  return result;
}

void print_heading(std::FILE* out, const Options& o, const Backend& backend, int ranks) {
  fmt::print(out,
             "{} on {}, {} ranks, float32, median of {} repeats after {}\n"
             "algbw = bytes/time; busbw = algbw x (n-1)/n, all_reduce x 2(n-1)/n (as nccl-tests)\n"
             "{:<15} {:>13} {:>12} {:>12} {:>12}  {}\n",
             o.backend, backend.name(), ranks, o.repeats, o.warmup, "collective", "bytes",
             "time us", "algbw GB/s", "busbw GB/s", "result");
}

void report(const Case& collective, int64_t bytes, const Result& result, const Options& o,
            const Backend& backend, int ranks) {
  const auto& s = result.seconds;
  const size_t n = s.size();
  const double median = n % 2 ? s[n / 2] : 0.5 * (s[n / 2 - 1] + s[n / 2]);
  const double algbw = static_cast<double>(bytes) / median / 1e9;
  const double busbw = algbw * collective.bus_factor(ranks);
  fmt::print(o.json ? stderr : stdout, "{:<15} {:>13} {:>12.1f} {:>12.3f} {:>12.3f}  {}\n",
             collective.name(), bytes, median * 1e6, algbw, busbw,
             result.right ? "right" : "WRONG");
  if (!o.json) return;
  nlohmann::ordered_json line;
  line["collective"] = collective.name();
  line["backend"] = o.backend;
  line["device"] = backend.name();
  line["ranks"] = ranks;
  line["dtype"] = "float32";
  line["bytes"] = bytes;
  line["warmup"] = o.warmup;
  line["repeats"] = o.repeats;
  line["median_s"] = median;
  line["min_s"] = s.front();
  line["max_s"] = s.back();
  line["algbw_gb_per_s"] = algbw;
  line["busbw_gb_per_s"] = busbw;
  line["right"] = result.right;
  fmt::print("{}\n", line.dump());
}

// Sizes that the ranks divide, so that all collectives move the same bytes.
std::vector<int64_t> sizes_of(const Options& o, int ranks) {
  std::vector<int64_t> numels;
  for (uint64_t bytes = o.min_bytes; bytes <= o.max_bytes;
       bytes *= static_cast<uint64_t>(o.factor)) {
    const int64_t n = static_cast<int64_t>(bytes / sizeof(float)) / ranks * ranks;
    if (n > 0 && (numels.empty() || n > numels.back())) numels.push_back(n);
  }
  return numels;
}

bool run_all(const Options& o, RunDevice& device) {
  const auto world = device.connect();
  const Backend& backend = device.backend();
  const int ranks = world->size();
  const auto numels = sizes_of(o, ranks);
  SAFEGRAD_CHECK(!numels.empty(), InputError,
                 "--min-bytes {} to --max-bytes {}: no size has an element for each of {} ranks",
                 o.min_bytes, o.max_bytes, ranks);
  if (world->rank() == 0) print_heading(o.json ? stderr : stdout, o, backend, ranks);
  bool right = true;
  for (const int64_t n : numels) {
    const auto group = world->split(0);  // with it goes the memory of this size
    const at::Device place = backend.device();
    std::vector<std::unique_ptr<Case>> cases;
    cases.push_back(std::make_unique<AllGather>(*group, n / ranks, place));
    cases.push_back(std::make_unique<ReduceScatter>(*group, n / ranks, place));
    cases.push_back(std::make_unique<AllReduce>(*group, n, place));
    for (const auto& collective : cases) {
      const Result result = measure(*collective, *group, backend, o);
      right &= result.right;
      if (world->rank() == 0)
        report(*collective, n * static_cast<int64_t>(sizeof(float)), result, o, backend, ranks);
    }
  }
  return right;
}

void add_options(CLI::App& app, Options& o) {
  const CLI::Range sizes(uint64_t{sizeof(float)}, uint64_t{1} << 40);
  app.add_option("--min-bytes", o.min_bytes, "smallest size")
      ->transform(CLI::AsSizeValue(false))
      ->check(sizes)
      ->capture_default_str();
  app.add_option("--max-bytes", o.max_bytes, "largest size")
      ->transform(CLI::AsSizeValue(false))
      ->check(sizes)
      ->capture_default_str();
  app.add_option("--factor", o.factor, "from one size to the next")
      ->check(CLI::IsMember({2, 4}))
      ->capture_default_str();
  app.add_option("--warmup", o.warmup, "runs before the timed ones")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--repeats", o.repeats, "timed runs")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--backend", o.backend, "mpi: CPU tensors; nccl: one GPU a rank")
      ->check(CLI::IsMember({"mpi", "nccl"}))
      ->capture_default_str();
  app.add_flag("--json", o.json, "JSON lines on stdout, the table on stderr");
}

}  // namespace

int main(int argc, char** argv) {
  mallopt(M_MMAP_MAX, 0);  // as the safegrad program does
  mallopt(M_TRIM_THRESHOLD, -1);
  Options o;
  CLI::App app(kHelp, "bench_collectives");
  add_options(app, o);
  CLI11_PARSE(app, argc, argv);

  std::unique_ptr<dist::Launcher> launcher;
  try {
    launcher = dist::make_launcher(&argc, &argv);
    ParallelSection parallel;
    parallel.device = o.backend == "nccl" ? Device::cuda : Device::cpu;
    std::vector<std::string> warnings;
    RunDevice device(parallel, *launcher, warnings);
    return run_all(o, device) ? 0 : 2;
  } catch (const dist::JobFailed& e) {
    if (*e.what()) fmt::print(stderr, "error: {}\n", e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    const auto* known = dynamic_cast<const Error*>(&e);
    const int exit_code = known ? known->exit_code() : 2;
    if (launcher) launcher->abort(exit_code);
    return exit_code;
  }
}
