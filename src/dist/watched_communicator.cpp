#include "dist/watched_communicator.h"

#include <exception>
#include <utility>

#include <ATen/core/Tensor.h>

namespace safegrad::dist {
namespace {

int64_t size_in_bytes(const at::Tensor& t) {
  return t.numel() * t.element_size();
}

int64_t bytes_of(int64_t numel, at::ScalarType dtype) {
  return numel * static_cast<int64_t>(c10::elementSize(dtype));
}

// Blocks from construction to destruction. One that failed did not finish: that is what the record
// is for.
class Blocking {
 public:
  Blocking(FlightRecord& record, Flight flight)
      : record_(record), number_(record.begin(std::move(flight))) {
    record_.await(number_);
  }
  Blocking(FlightRecord& record, int64_t number) : record_(record), number_(number) {
    record_.await(number_);
  }
  ~Blocking() {
    if (std::uncaught_exceptions() == failures_) record_.finish(number_);
  }
  Blocking(const Blocking&) = delete;
  Blocking& operator=(const Blocking&) = delete;

 private:
  FlightRecord& record_;
  int64_t number_;
  int failures_ = std::uncaught_exceptions();
};

class WatchedWork : public Work {
 public:
  WatchedWork(std::unique_ptr<Work> inner, FlightRecord& record, int64_t number)
      : inner_(std::move(inner)), record_(record), number_(number) {}
  void wait() override {
    const Blocking blocking(record_, number_);
    inner_->wait();
  }

 private:
  std::unique_ptr<Work> inner_;
  FlightRecord& record_;
  int64_t number_;
};

// What control planes and communicators have in common.
template <class Kind>
class Watched : public Kind {
 public:
  Watched(std::unique_ptr<Kind> inner, FlightRecord& record, std::string group)
      : inner_(std::move(inner)), record_(record), group_(std::move(group)) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  void about(std::string_view subject) override { subject_ = subject; }
  std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) override {
    const Blocking blocking(record_, next("all_gather of words", words.size_bytes()));
    return inner_->all_gather_words(words);
  }
  std::string broadcast(const std::string& text, int root) override {
    const Blocking blocking(record_, next("broadcast", -1));
    return inner_->broadcast(text, root);
  }
  void barrier() override {
    const Blocking blocking(record_, next("barrier", 0));
    inner_->barrier();
  }
  std::unique_ptr<ControlPlane> split_control(int colour) override {
    const Blocking blocking(record_, next("split", -1));
    return watch(inner_->split_control(colour), record_, part(colour));
  }

 protected:
  Flight next(const char* operation, int64_t bytes) {
    Flight flight;
    flight.group = group_;
    flight.group_number = ++calls_;
    flight.operation = operation;
    flight.subject = subject_;
    flight.bytes = bytes;
    return flight;
  }
  // A part has the name of its subject, or of where it comes from.
  std::string part(int colour) const {
    return subject_.empty() ? group_ + "/" + std::to_string(calls_) + "." + std::to_string(colour)
                            : subject_ + " " + std::to_string(colour);
  }

  std::unique_ptr<Kind> inner_;
  FlightRecord& record_;
  std::string group_, subject_;
  int64_t calls_ = 0;
};

class WatchedCommunicator : public Watched<Communicator> {
 public:
  using Watched::Watched;

  const std::map<std::string, Traffic>& traffic() const override { return inner_->traffic(); }

  ShardMemory allocate_shards(int64_t numel, at::ScalarType dtype) override {
    const Blocking blocking(record_, next("allocation of shards", bytes_of(numel, dtype)));
    return inner_->allocate_shards(numel, dtype);
  }
  void finish_shard_writes() override {
    const Blocking blocking(record_, next("end of shard writes", 0));
    inner_->finish_shard_writes();
  }
  at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) override {
    const Blocking blocking(record_,
                            next("allocation of a reduce_scatter's input", bytes_of(numel, dtype)));
    return inner_->allocate_reduce_input(numel, dtype);
  }
  at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) override {
    const Blocking blocking(record_,
                            next("allocation of an all_gather's output", bytes_of(numel, dtype)));
    return inner_->allocate_gather_output(numel, dtype);
  }
  std::unique_ptr<Work> all_gather(at::Tensor full, at::Tensor shard) override {
    return follow("all_gather", size_in_bytes(full),
                  [&] { return inner_->all_gather(std::move(full), std::move(shard)); });
  }
  std::unique_ptr<Work> reduce_scatter(at::Tensor shard, at::Tensor full) override {
    return follow("reduce_scatter", size_in_bytes(full),
                  [&] { return inner_->reduce_scatter(std::move(shard), std::move(full)); });
  }
  void all_reduce(at::Tensor t) override {
    const Blocking blocking(record_, next("all_reduce", size_in_bytes(t)));
    inner_->all_reduce(std::move(t));
  }
  std::vector<double> all_gather_scalars(const at::Tensor& values) override {
    const Blocking blocking(record_, next("all_gather of scalars", size_in_bytes(values)));
    return inner_->all_gather_scalars(values);
  }
  std::unique_ptr<Communicator> split(int colour) override {
    const Blocking blocking(record_, next("split", -1));
    return watch(inner_->split(colour), record_, part(colour));
  }

 private:
  // Where a network connects at the first use, starting takes as long as waiting.
  template <class Start>
  std::unique_ptr<Work> follow(const char* operation, int64_t bytes, const Start& start) {
    const int64_t number = record_.begin(next(operation, bytes));
    record_.await(number);
    std::unique_ptr<Work> work = start();
    record_.go_on(number);
    return std::make_unique<WatchedWork>(std::move(work), record_, number);
  }
};

}  // namespace

std::unique_ptr<ControlPlane> watch(std::unique_ptr<ControlPlane> inner, FlightRecord& record,
                                    std::string group) {
  return std::make_unique<Watched<ControlPlane>>(std::move(inner), record, std::move(group));
}

std::unique_ptr<Communicator> watch(std::unique_ptr<Communicator> inner, FlightRecord& record,
                                    std::string group) {
  return std::make_unique<WatchedCommunicator>(std::move(inner), record, std::move(group));
}

}  // namespace safegrad::dist
