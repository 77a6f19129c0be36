#include "dist/mpi_communicator.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include <ATen/ATen.h>
#include <mpi.h>

#include "core/error.h"
#include "dist/message_sizes.h"
#include "dist/node_reduce.h"
#include "dist/shared_memory.h"

namespace safegrad::dist {
namespace {

// An all-gather's messages: MPI counts are int.
constexpr int64_t kMessageBytes = 1 << 30;
constexpr int kTags = 1 << 14;

struct Group {
  MPI_Comm comm;
  int rank, size;

  void check(int code, const char* operation) const {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw CommError(fmt::format("rank {} of {}: {}: {}", rank, size, operation,
                                std::string(text, static_cast<size_t>(length))));
  }
};

std::byte* bytes_of(const at::Tensor& t) {
  return static_cast<std::byte*>(t.data_ptr());
}
int64_t size_in_bytes(const at::Tensor& t) {
  return t.numel() * t.element_size();
}

class NoWork : public Work {
 public:
  void wait() override {}
};

class GatherWork : public Work {
 public:
  GatherWork(Group group, at::Tensor full, at::Tensor shard, int tag)
      : group_(group), full_(std::move(full)), shard_(std::move(shard)) {
    const int64_t n = size_in_bytes(shard_);
    for (int peer = 0; peer < group_.size; ++peer) {
      if (peer == group_.rank) continue;
      for (int64_t b = 0; b < n; b += kMessageBytes) {
        const auto length = static_cast<int>(std::min(kMessageBytes, n - b));
        group_.check(MPI_Irecv(bytes_of(full_) + peer * n + b, length, MPI_BYTE, peer, tag,
                               group_.comm, &requests_.emplace_back()),
                     "all_gather receive");
      }
    }
    for (int step = 1; step < group_.size; ++step) {  // each rank starts with another peer
      const int peer = (group_.rank + step) % group_.size;
      for (int64_t b = 0; b < n; b += kMessageBytes) {
        const auto length = static_cast<int>(std::min(kMessageBytes, n - b));
        group_.check(MPI_Isend(bytes_of(shard_) + b, length, MPI_BYTE, peer, tag, group_.comm,
                               &requests_.emplace_back()),
                     "all_gather send");
      }
    }
    // Not memcpy, which takes no null pointer: a tensor without elements has one.
    std::copy_n(bytes_of(shard_), n, bytes_of(full_) + group_.rank * n);
  }

  void wait() override {
    group_.check(
        MPI_Waitall(static_cast<int>(requests_.size()), requests_.data(), MPI_STATUSES_IGNORE),
        "all_gather");
    requests_.clear();
  }

 private:
  Group group_;
  at::Tensor full_, shard_;
  std::vector<MPI_Request> requests_;
};

// Every rank sends each peer its slice in pieces; the receiver adds the pieces of all ranks in rank
// order. So the sum does not depend on who arrives first, and no reduction tree changes with the
// rank count.
class ReduceScatterWork : public Work {
 public:
  ReduceScatterWork(Group group, at::Tensor shard, at::Tensor full, int tag)
      : group_(group),
        shard_(std::move(shard)),
        full_(std::move(full)),
        tag_(tag),
        window_(group.size, shard_.numel(), full_.element_size()),
        pieces_(window_.pieces) {
    received_ = at::empty({window_.ahead, group_.size, window_.piece}, full_.options());
    receives_.assign(static_cast<size_t>(window_.ahead * group_.size), MPI_REQUEST_NULL);
    for (int64_t p = 0; p < window_.ahead; ++p) post_receives(p);
    for (int64_t p = 0; p < pieces_; ++p) {
      for (int step = 1; step < group_.size; ++step) {
        const int peer = (group_.rank + step) % group_.size;
        const std::byte* data =
            bytes_of(full_) + (peer * shard_.numel() + p * window_.piece) * full_.element_size();
        group_.check(MPI_Isend(data, byte_count(p), MPI_BYTE, peer, tag_, group_.comm,
                               &sends_.emplace_back()),
                     "reduce_scatter send");
      }
    }
  }

  void wait() override {
    for (int64_t p = 0; p < pieces_; ++p) {
      MPI_Request* requests = receives_.data() + (p % window_.ahead) * group_.size;
      group_.check(MPI_Waitall(group_.size, requests, MPI_STATUSES_IGNORE),
                   "reduce_scatter receive");
      add_piece(p);
      if (p + window_.ahead < pieces_) post_receives(p + window_.ahead);
    }
    group_.check(MPI_Waitall(static_cast<int>(sends_.size()), sends_.data(), MPI_STATUSES_IGNORE),
                 "reduce_scatter send");
    sends_.clear();
    pieces_ = 0;
  }

 private:
  int64_t length(int64_t p) const {
    return std::min(window_.piece, shard_.numel() - p * window_.piece);
  }
  int byte_count(int64_t p) const { return static_cast<int>(length(p) * full_.element_size()); }

  void post_receives(int64_t p) {
    for (int peer = 0; peer < group_.size; ++peer) {
      if (peer == group_.rank) continue;
      const int64_t slot = (p % window_.ahead) * group_.size + peer;
      std::byte* place = bytes_of(received_) + slot * window_.piece * received_.element_size();
      group_.check(MPI_Irecv(place, byte_count(p), MPI_BYTE, peer, tag_, group_.comm,
                             &receives_[static_cast<size_t>(slot)]),
                   "reduce_scatter receive");
    }
  }

  void add_piece(int64_t p) {
    const int64_t begin = p * window_.piece, n = length(p);
    at::Tensor sum = shard_.narrow(0, begin, n);
    auto contribution = [&](int peer) {
      return peer == group_.rank ? full_.narrow(0, peer * shard_.numel() + begin, n)
                                 : received_[p % window_.ahead][peer].narrow(0, 0, n);
    };
    at::add_out(sum, contribution(0), contribution(1));
    for (int peer = 2; peer < group_.size; ++peer) sum.add_(contribution(peer));
  }

  Group group_;
  at::Tensor shard_, full_, received_;
  int tag_;
  ReceiveWindow window_;
  int64_t pieces_;  // 0 once all are summed
  std::vector<MPI_Request> sends_, receives_;
};

class MpiCommunicator : public Communicator {
 public:
  explicit MpiCommunicator(MPI_Comm comm) : group_{comm, 0, 1} {
    MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
    group_.check(MPI_Comm_rank(comm, &group_.rank), "MPI_Comm_rank");
    group_.check(MPI_Comm_size(comm, &group_.size), "MPI_Comm_size");
  }

  int rank() const override { return group_.rank; }
  int size() const override { return group_.size; }

  ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) override {
    const at::Tensor all =
        size() > 1 && numel > 0 ? allocate_shared(*this, numel * size(), dtype) : at::Tensor();
    if (!all.defined()) return {at::zeros({numel}, dtype), {}};
    shared_.push_back(all);
    return {all.narrow(0, rank() * numel, numel), all};
  }

  // The same list on every rank: shared memory is had by all of them or by none.
  void finish_shard_writes() override {
    if (!shared_.empty()) barrier();
  }

  at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) override {
    if (!node_) node_ = std::make_unique<NodeReduce>(*this);
    const at::Tensor buffer = node_->allocate(numel, dtype);
    return buffer.defined() ? buffer : at::empty({numel}, dtype);
  }

  at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) override {
    return at::empty({numel}, dtype);
  }

  std::unique_ptr<Work> all_gather(at::Tensor full, at::Tensor shard) override {
    require(full.numel() == shard.numel() * size(), "all_gather", full, shard);
    count("all_gather", (size() - 1) * size_in_bytes(shard));
    if (is_shared(full)) return std::make_unique<NoWork>();
    return std::make_unique<GatherWork>(group_, std::move(full), std::move(shard), next_tag());
  }

  std::unique_ptr<Work> reduce_scatter(at::Tensor shard, at::Tensor full) override {
    require(full.numel() == shard.numel() * size(), "reduce_scatter", full, shard);
    count("reduce_scatter", (size() - 1) * size_in_bytes(shard));
    if (size() == 1) {
      shard.copy_(full);
      return std::make_unique<NoWork>();
    }
    if (node_) {
      if (auto work = node_->start(shard, full)) return work;
    }
    return std::make_unique<ReduceScatterWork>(group_, std::move(shard), std::move(full),
                                               next_tag());
  }

  void all_reduce(at::Tensor t) override {
    require(true, "all_reduce", t, t);
    count("all_reduce", 2 * (size() - 1) * size_in_bytes(t) / size());
    if (size() == 1 || t.numel() == 0) return;
    // A reduce-scatter and an all-gather of what it left: the same rank-ordered sums. The tail that
    // does not divide travels padded.
    const int64_t n = (t.numel() + size() - 1) / size();
    at::Tensor full = t;
    if (n * size() != t.numel())
      full = at::cat({t, at::zeros({n * size() - t.numel()}, t.options())});
    at::Tensor shard = at::empty({n}, t.options());
    ReduceScatterWork(group_, shard, full, next_tag()).wait();
    GatherWork(group_, full, shard, next_tag()).wait();
    if (!full.is_same(t)) t.copy_(full.narrow(0, 0, t.numel()));
  }

  std::vector<double> all_gather_scalars(const at::Tensor& values) override {
    require(values.scalar_type() == at::kDouble, "all_gather_scalars", values, values);
    count("scalars", (size() - 1) * size_in_bytes(values));
    std::vector<double> all(static_cast<size_t>(values.numel() * size()));
    const int n = static_cast<int>(values.numel());
    group_.check(MPI_Allgather(values.data_ptr<double>(), n, MPI_DOUBLE, all.data(), n, MPI_DOUBLE,
                               group_.comm),
                 "all_gather of scalars");
    return all;
  }

  std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) override {
    count("scalars", static_cast<int64_t>((size() - 1) * words.size_bytes()));
    std::vector<uint64_t> all(words.size() * static_cast<size_t>(size()));
    const int n = static_cast<int>(words.size());
    group_.check(
        MPI_Allgather(words.data(), n, MPI_UINT64_T, all.data(), n, MPI_UINT64_T, group_.comm),
        "all_gather of scalars");
    return all;
  }

  std::string broadcast(const std::string& text, int root) override {
    uint64_t length = text.size();
    group_.check(MPI_Bcast(&length, 1, MPI_UINT64_T, root, group_.comm), "broadcast");
    std::string result = rank() == root ? text : std::string(length, '\0');
    group_.check(MPI_Bcast(result.data(), static_cast<int>(length), MPI_BYTE, root, group_.comm),
                 "broadcast");
    return result;
  }

  void barrier() override { group_.check(MPI_Barrier(group_.comm), "barrier"); }

  std::unique_ptr<Communicator> split(int colour) override {
    MPI_Comm part = MPI_COMM_NULL;
    group_.check(MPI_Comm_split(group_.comm, colour, rank(), &part), "MPI_Comm_split");
    return std::make_unique<MpiCommunicator>(part);
  }

 private:
  // Outstanding operations differ in their tags, so that the pieces of one never meet the receives
  // of another.
  int next_tag() { return static_cast<int>(sequence_++ % kTags); }

  void require(bool sizes_fit, const char* operation, const at::Tensor& a,
               const at::Tensor& b) const {
    SAFEGRAD_CHECK(sizes_fit, UsageError, "{}: {} elements do not fit {} a rank on {} ranks",
                   operation, a.numel(), b.numel(), size());
    SAFEGRAD_CHECK(a.is_contiguous() && b.is_contiguous() && a.dim() == 1 && b.dim() == 1 &&
                       a.device().is_cpu() && a.scalar_type() == b.scalar_type(),
                   UsageError, "{}: needs flat contiguous CPU tensors of one dtype", operation);
  }

  bool is_shared(const at::Tensor& full) const {
    return std::any_of(shared_.begin(), shared_.end(),
                       [&](const at::Tensor& all) { return all.data_ptr() == full.data_ptr(); });
  }

  Group group_;
  int64_t sequence_ = 0;
  std::vector<at::Tensor> shared_;  // what allocate_shards gave out, seen by every rank
  std::unique_ptr<NodeReduce> node_;
};

}  // namespace

MpiEnvironment::MpiEnvironment(int* argc, char*** argv) {
  int provided = 0;
  const int code = MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
  SAFEGRAD_CHECK(code == MPI_SUCCESS && provided >= MPI_THREAD_FUNNELED, CommError,
                 "MPI did not start (code {}, thread level {} of {})", code, provided,
                 static_cast<int>(MPI_THREAD_FUNNELED));
}

MpiEnvironment::~MpiEnvironment() {
  MPI_Finalize();
}

void abort_job(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::abort();  // not reached: MPI_Abort ends the process
}

std::unique_ptr<Communicator> make_mpi_world() {
  // Its own, so that what is called on one world never meets what is called on another.
  MPI_Comm own = MPI_COMM_NULL;
  SAFEGRAD_CHECK(MPI_Comm_dup(MPI_COMM_WORLD, &own) == MPI_SUCCESS, CommError,
                 "MPI could not duplicate the world's communicator");
  return std::make_unique<MpiCommunicator>(own);
}

}  // namespace safegrad::dist
