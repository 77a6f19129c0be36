#include "dist/control_plane.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <future>
#include <thread>

#include "core/error.h"
#include "dist/job_failed.h"

namespace safegrad::dist {

std::vector<double> all_gather_doubles(ControlPlane& control, std::span<const double> values) {
  std::vector<uint64_t> words;
  for (double v : values) words.push_back(std::bit_cast<uint64_t>(v));
  std::vector<double> result;
  for (uint64_t w : control.all_gather_words(words)) result.push_back(std::bit_cast<double>(w));
  return result;
}

std::vector<std::string> all_gather_text(ControlPlane& control, const std::string& text) {
  const uint64_t own_size = text.size();
  const auto sizes = control.all_gather_words(std::span(&own_size, 1));
  const size_t words = *std::max_element(sizes.begin(), sizes.end()) / sizeof(uint64_t) + 1;
  std::vector<uint64_t> own(words);
  std::memcpy(own.data(), text.data(), text.size());
  const auto all = control.all_gather_words(own);
  std::vector<std::string> texts;
  for (size_t r = 0; r < sizes.size(); ++r)
    texts.emplace_back(reinterpret_cast<const char*>(all.data() + r * words), sizes[r]);
  return texts;
}

void agree(ControlPlane& control, const std::function<void()>& work) {
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
    message = fmt::format("rank {}: {}", control.rank(), e.what());
    exit_code = 2;
  }
  const auto codes = control.all_gather_words(std::span(&exit_code, 1));
  for (int r = 0; r < control.size(); ++r) {
    const uint64_t code = codes[static_cast<size_t>(r)];
    if (code != 0) throw JobFailed(r == control.rank() ? message : "", static_cast<int>(code));
  }
}

void await_all(ControlPlane& control, const std::function<bool()>& busy) {
  for (;;) {
    for (int pause = 0; pause < 100 && busy(); ++pause)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    const uint64_t own = busy();
    const auto all = control.all_gather_words(std::span(&own, 1));
    if (std::all_of(all.begin(), all.end(), [](uint64_t word) { return word == 0; })) return;
  }
}

void agree_patiently(ControlPlane& control, const std::function<void()>& work) {
  std::future<void> result = std::async(std::launch::async, work);
  await_all(control,
            [&] { return result.wait_for(std::chrono::seconds(0)) != std::future_status::ready; });
  agree(control, [&] { result.get(); });
}

}  // namespace safegrad::dist
