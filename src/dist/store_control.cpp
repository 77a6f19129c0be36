#include "dist/store_control.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include <fmt/ranges.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "core/error.h"

namespace safegrad::dist {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

std::string text_of(const std::exception& e) {
  const auto* torch = dynamic_cast<const c10::Error*>(&e);
  return torch ? torch->what_without_backtrace() : e.what();
}

class StoreControl : public ControlPlane {
 public:
  StoreControl(StoreGroup group, milliseconds deadline)
      : group_(std::move(group)), deadline_(deadline) {}

  int rank() const override { return group_.rank; }
  int size() const override { return group_.size; }

  std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) override {
    const auto all =
        exchange("all_gather of words",
                 std::string(reinterpret_cast<const char*>(words.data()), words.size_bytes()));
    const size_t expected = words.size_bytes() * static_cast<size_t>(size());
    SAFEGRAD_CHECK(all.size() == expected, CommError,
                   "{}: the ranks sent {} bytes together, {} were due: they are not in the same "
                   "place of the program",
                   place("all_gather of words"), all.size(), expected);
    std::vector<uint64_t> result(words.size() * static_cast<size_t>(size()));
    if (!all.empty()) std::memcpy(result.data(), all.data(), all.size());
    return result;
  }

  // As an exchange to which the root alone contributes it waits for all ranks. A root that ran
  // ahead could not tell when its text has been read.
  std::string broadcast(const std::string& text, int root) override {
    return exchange("broadcast", rank() == root ? text : "");
  }

  void barrier() override { exchange("barrier", ""); }

  std::unique_ptr<ControlPlane> split_control(int colour) override {
    const auto own = static_cast<uint64_t>(colour);
    const auto colours = all_gather_words(std::span(&own, 1));
    StoreGroup part{group_.store, fmt::format("{}/{}.{}", group_.prefix, number_, colour), 0, 0};
    for (size_t r = 0; r < colours.size(); ++r) {
      if (colours[r] != own) continue;
      if (static_cast<int>(r) == rank()) part.rank = part.size;
      ++part.size;
    }
    return std::make_unique<StoreControl>(std::move(part), deadline_);
  }

 private:
  std::string part(int64_t number, int r) const {
    return fmt::format("{}/{}/{}", group_.prefix, number, r);
  }
  std::string whole(int64_t number) const {
    return fmt::format("{}/{}/all", group_.prefix, number);
  }
  std::string place(const char* operation) const {
    return fmt::format("rank {} of {}: {} (exchange {} of group {})", rank(), size(), operation,
                       number_, group_.prefix);
  }

  // What all ranks contribute, one behind the other.
  std::string exchange(const char* operation, const std::string& own) {
    ++number_;
    if (size() == 1) return own;
    const auto end = Clock::now() + deadline_;
    try {
      group_.store->set(part(number_, rank()), own);
      if (rank() == 0) collect(end);
      await({whole(number_)}, end);
      std::string all = group_.store->get_to_str(whole(number_));
      // Everybody has entered this exchange, so has left the one before.
      if (number_ > 1) forget(number_ - 1);
      return all;
    } catch (const std::exception& e) {
      throw CommError(fmt::format("{}: {}", place(operation), explain(e)));
    }
  }

  void collect(Clock::time_point end) {
    std::vector<std::string> parts;
    for (int r = 0; r < size(); ++r) parts.push_back(part(number_, r));
    await(parts, end);
    std::string all;
    for (const auto& bytes : group_.store->multiGet(parts)) all.append(bytes.begin(), bytes.end());
    group_.store->set(whole(number_), all);
  }

  void await(const std::vector<std::string>& keys, Clock::time_point end) {
    const auto left = std::chrono::duration_cast<milliseconds>(end - Clock::now());
    group_.store->wait(keys, std::max(left, milliseconds(1)));  // to a store 0 means for ever
  }

  void forget(int64_t number) {
    group_.store->deleteKey(part(number, rank()));
    if (rank() == 0) group_.store->deleteKey(whole(number));
  }

  std::string explain(const std::exception& e) {
    std::vector<int> missing;
    try {
      for (int r = 0; r < size(); ++r) {
        if (!group_.store->check({part(number_, r)})) missing.push_back(r);
      }
    } catch (const std::exception&) {
      return "the store no longer answers: " + text_of(e);
    }
    if (missing.empty()) return text_of(e);
    return fmt::format("rank {} did not arrive within {:g} s", fmt::join(missing, ", "),
                       std::chrono::duration<double>(deadline_).count());
  }

  StoreGroup group_;
  milliseconds deadline_;
  int64_t number_ = 0;  // of the current exchange, from 1
};

}  // namespace

std::unique_ptr<ControlPlane> make_store_control(StoreGroup group, milliseconds deadline) {
  return std::make_unique<StoreControl>(std::move(group), deadline);
}

}  // namespace safegrad::dist
