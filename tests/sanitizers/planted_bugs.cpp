// planted_bugs.cpp: one bug of each kind that the sanitizers are here for. A build that does not
// report them would not report ours.
//
// Usage: planted_bugs race | overrun | overflow | index
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

// The watchdog and a rank, without the lock of the flight record: one enters collectives while the
// other looks. What they do comes to the same end either way.
void race_on_unlocked_record() {
  std::vector<std::string> record(4, "barrier");
  size_t seen = 0;
  std::thread watch([&] {
    for (int look = 0; look < 1000; ++look) seen += record[static_cast<size_t>(look) % 4].size();
  });
  for (int number = 0; number < 1000; ++number)
    record[static_cast<size_t>(number) % 4].assign("barrier");
  watch.join();
  std::printf("%zu\n", seen);
}

// A shard that is read to the end of the padded unit that it is a part of.
void overrun_shard(size_t padded) {
  const auto shard = std::make_unique<float[]>(padded - 1);
  std::vector<float> copy(padded);
  for (size_t i = 0; i < padded; ++i) copy[i] = shard[i];
  std::printf("%g\n", static_cast<double>(copy[0]));
}

// Elements of a tensor whose shape a file has made up.
void overflow_elements(int64_t rows) {
  const int64_t elements = rows * 3;
  std::printf("%lld\n", static_cast<long long>(elements));
}

// Within the vector's memory, where the address sanitizer alone sees nothing wrong.
void index_past_size(size_t index) {
  std::vector<int> tokens;
  tokens.reserve(index + 1);
  std::printf("%p\n", static_cast<void*>(&tokens[index]));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view bug = argc == 2 ? argv[1] : "";
  const auto few = static_cast<size_t>(argc);  // what no compiler sees through
  if (bug == "race") {
    race_on_unlocked_record();
  } else if (bug == "overrun") {
    overrun_shard(1 + few);
  } else if (bug == "overflow") {
    overflow_elements(std::numeric_limits<int64_t>::max() / argc);
  } else if (bug == "index") {
    index_past_size(few);
  } else {
    std::fputs("usage: planted_bugs race|overrun|overflow|index\n", stderr);
    return 1;
  }
  return 0;
}
