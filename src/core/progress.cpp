// progress.cpp: the part of metrics.h that draws on the terminal.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string_view>
#include <system_error>
#include <utility>

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "core/metrics.h"
#include "core/terminal.h"

namespace safegrad {
namespace {

constexpr size_t kMedianOf = 20;
constexpr int kMinBar = 8;
constexpr int kMaxBar = 22;
constexpr int kFallbackWidth = 80;  // terminals behind a pseudo-terminal may not know theirs

/// A part of the line. Those with a larger `spare` are left out first, those with 0 never. On a
/// terminal it takes the room of its usual largest text: what is left out, and where the others
/// stand, then is the same in all steps.
struct Field {
  std::string text;
  int spare;
  int usual;  // columns
};

/// Columns of UTF-8 text whose every character is one column wide.
int columns(const std::string& text) {
  return static_cast<int>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

std::string cut(const std::string& text, int width) {
  size_t end = 0;
  for (int column = 0; end < text.size(); ++end) {
    const bool starts = (static_cast<unsigned char>(text[end]) & 0xC0) != 0x80;
    if (starts && column++ == width) break;
  }
  return text.substr(0, end);
}

/// Where a process's standard output goes; empty where this may not be known.
std::string output_of(const std::string& process) {
  std::error_code unknown;
  return std::filesystem::read_symlink("/proc/" + process + "/fd/1", unknown).string();
}

/// The fourth word of /proc/PID/stat; the second, a name in parentheses, may hold anything.
std::string parent_of(const std::string& process) {
  std::ifstream stat("/proc/" + process + "/stat");
  std::string text, state, parent;
  std::getline(stat, text, '\0');
  std::istringstream(text.substr(text.rfind(')') + 1)) >> state >> parent;
  return parent;
}

/// mpirun gives its ranks a terminal of its own, whatever its own output is. So the nearest
/// ancestor that does not write to that terminal, mpirun or its daemon on another machine, tells.
bool relayed_to_terminal() {
  const std::string own = output_of("self");
  std::string process = parent_of("self");
  while (!own.empty() && output_of(process) == own) process = parent_of(process);
  const std::string relay = output_of(process);
  return relay.starts_with("/dev/pts/") || relay.starts_with("/dev/tty");
}

std::string bar(double share, int width) {
  const int halves = static_cast<int>(std::clamp(share, 0.0, 1.0) * 2 * width);
  std::string text;
  for (int i = 0; i < width; ++i) {
    text += 2 * i + 1 < halves ? "━" : 2 * i + 1 == halves ? "╸" : "─";
  }
  return text;
}

/// With a real minus sign, which is as wide as a digit.
std::string signed_number(double x) {
  return x < 0 ? fmt::format("−{:.2f}", -x) : fmt::format("{:.2f}", x);
}

std::vector<Field> fields_of(const StepRecord& record, const std::string& align_label,
                             double seconds_left) {
  std::vector<Field> fields;
  if (record.skipped) fields.push_back({"SKIPPED (not finite)", 0, 0});
  if (record.skipped || std::isfinite(record.loss_task))
    fields.push_back({fmt::format("task {:.3f}", record.loss_task), 2, 10});
  if (record.loss_align) {
    fields.push_back({fmt::format("{} {}", align_label, format_loss(*record.loss_align)), 3,
                      columns(align_label) + 7});
  }
  if (record.cosine) {
    fields.push_back(
        {fmt::format("cos {}{}", signed_number(*record.cosine), record.conflict ? " conflict" : ""),
         4, columns("cos −0.21 conflict")});
  }
  fields.push_back({fmt::format("{:.0f} tok/s", record.tokens_per_s), 5, 11});
  if (record.speed_of_light > 0) {
    fields.push_back({fmt::format("speed of light {:.0f} %", 100 * record.speed_of_light), 6, 20});
  }
  fields.push_back({fmt::format("{} left", format_duration(seconds_left)), 1, 10});
  return fields;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int terminal_width(std::FILE* stream) {
  winsize size{};
  const bool known = ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : kFallbackWidth;
}

}  // namespace

bool is_terminal(std::FILE* stream) {
  const char* term = std::getenv("TERM");
  if (isatty(fileno(stream)) != 1 || (term && std::string_view(term) == "dumb")) return false;
  const bool mpirun = fileno(stream) == STDOUT_FILENO && std::getenv("OMPI_COMM_WORLD_RANK");
  return !mpirun || relayed_to_terminal();
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds > 1e15) return "?";
  const int64_t all = std::max<int64_t>(0, std::llround(seconds));
  const int64_t hours = all / 3600, minutes = all / 60 % 60;
  if (hours > 0) return fmt::format("{}:{:02}:{:02}", hours, minutes, all % 60);
  return fmt::format("{}:{:02}", minutes, all % 60);
}

std::string format_loss(double loss) {
  const double size = std::abs(loss);
  if (!(size < 0.01) || loss == 0) return fmt::format("{:.3f}", loss);
  if (size >= 0.001) return fmt::format("{:.4f}", loss);
  std::string text = fmt::format("{:.1e}", loss);
  const size_t exponent = text.find("e-0");
  if (exponent != std::string::npos) text.erase(exponent + 2, 1);
  return text;
}

std::string format_progress(const StepRecord& record, int64_t total_steps,
                            const std::string& align_label, double seconds_left, int width) {
  const std::string total = fmt::format("{}", total_steps);
  const std::string head = fmt::format("step {:>{}}/{}", record.step, total.size() + 1, total);
  std::vector<Field> fields = fields_of(record, align_label, seconds_left);
  const auto room_of = [&](const Field& field) {
    return std::max(columns(field.text), width > 0 ? field.usual : 0);
  };
  const auto used = [&] {
    int sum = columns(head);
    for (const Field& field : fields) sum += 2 + room_of(field);
    return sum;
  };
  while (width > 0 && used() > width) {
    const auto least =
        std::max_element(fields.begin(), fields.end(),
                         [](const Field& a, const Field& b) { return a.spare < b.spare; });
    if (least == fields.end() || least->spare == 0) break;
    fields.erase(least);
  }

  std::string line = head;
  const int room = std::min(kMaxBar, width - used() - 1);
  if (room >= kMinBar) {
    const double share =
        static_cast<double>(record.step) / static_cast<double>(std::max<int64_t>(1, total_steps));
    line.append(" ").append(bar(share, room));
  }
  for (const Field& field : fields) {
    line.append("  ").append(field.text);
    line.append(static_cast<size_t>(room_of(field) - columns(field.text)), ' ');
  }
  line.erase(line.find_last_not_of(' ') + 1);
  return width > 0 ? cut(line, width) : line;
}

ProgressLine::ProgressLine(std::FILE* stream, int64_t total_steps, std::string align_label,
                           double plain_interval_s)
    : stream_(stream),
      total_steps_(total_steps),
      align_label_(std::move(align_label)),
      plain_interval_s_(plain_interval_s),
      terminal_(is_terminal(stream)) {}

void ProgressLine::show(const StepRecord& record) {
  if (recent_seconds_.size() == kMedianOf) recent_seconds_.erase(recent_seconds_.begin());
  recent_seconds_.push_back(record.seconds);
  const double left = median(recent_seconds_) * static_cast<double>(total_steps_ - record.step);

  if (terminal_) {
    // One column stays free: a line that fills the row makes some terminals wrap before the \r.
    const int width = std::max(1, terminal_width(stream_) - 1);
    draw(fmt::format("\r{}\x1b[K",
                     format_progress(record, total_steps_, align_label_, left, width)));
    line_open_ = true;
    return;
  }
  const double now = steady_seconds();
  const bool due = !last_plain_s_ || now - *last_plain_s_ >= plain_interval_s_;
  if (!due && !record.skipped && record.step < total_steps_) return;
  last_plain_s_ = now;
  draw(format_progress(record, total_steps_, align_label_, left, 0) + "\n");
}

void ProgressLine::finish() {
  if (!line_open_) return;
  draw("\n");
  line_open_ = false;
}

void ProgressLine::draw(const std::string& text) {
  // Failures are ignored: a closed terminal is no reason to stop a run.
  std::fputs(text.c_str(), stream_);
  std::fflush(stream_);
}

}  // namespace safegrad
