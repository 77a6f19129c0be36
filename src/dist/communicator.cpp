#include "dist/communicator.h"

#include <bit>

#include "core/error.h"
#include "dist/job_failed.h"

namespace safegrad::dist {

void Communicator::count(const std::string& name, int64_t bytes) {
  Traffic& t = traffic_[name];
  t.calls += 1;
  t.bytes += bytes;
}

std::vector<double> all_gather_doubles(Communicator& comm, std::span<const double> values) {
  std::vector<uint64_t> words;
  for (double v : values) words.push_back(std::bit_cast<uint64_t>(v));
  std::vector<double> result;
  for (uint64_t w : comm.all_gather_words(words)) result.push_back(std::bit_cast<double>(w));
  return result;
}

void agree(Communicator& comm, const std::function<void()>& work) {
  std::string message;
  uint64_t exit_code = 0;
  try {
    work();
  } catch (const CommError&) {
    throw;  // the ranks no longer reach each other: nothing to agree on
  } catch (const Error& e) {
    message = e.what();
    exit_code = static_cast<uint64_t>(e.exit_code());
  } catch (const std::exception& e) {
    message = fmt::format("rank {}: {}", comm.rank(), e.what());
    exit_code = 2;
  }
  const auto codes = comm.all_gather_words(std::span(&exit_code, 1));
  for (int r = 0; r < comm.size(); ++r) {
    const uint64_t code = codes[static_cast<size_t>(r)];
    if (code != 0) throw JobFailed(r == comm.rank() ? message : "", static_cast<int>(code));
  }
}

}  // namespace safegrad::dist
