#include "core/machine_memory.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string_view>

#include <unistd.h>

namespace safegrad {
namespace {

// The least of the limits of a group and those above it. A container may see its own group as the
// root of the tree while /proc names it as the machine does: folders that are not there, and
// limits that are no number ("max"), say nothing.
int64_t tightest(const std::string& tree, std::string group, const char* file, int64_t most) {
  for (;;) {
    int64_t limit = 0;
    if (std::ifstream(tree + group + "/" + file) >> limit && limit > 0)
      most = std::min(most, limit);
    if (group.empty()) return most;
    group.erase(group.rfind('/'));
  }
}

bool names_memory(const std::string& controllers) {
  return ("," + controllers + ",").find(",memory,") != std::string::npos;
}

}  // namespace

int64_t machine_memory(const std::string& root) {
  int64_t most = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  std::ifstream groups(root + "/proc/self/cgroup");
  // "0::/a/b" of version 2, "5:cpu,memory:/a/b" of version 1.
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = line.substr(first + 1, second - first - 1);
    std::string group = line.substr(second + 1);
    if (group.empty() || group.front() != '/') continue;
    if (group == "/") group.clear();
    if (controllers.empty())
      most = tightest(root + "/sys/fs/cgroup", group, "memory.max", most);
    else if (names_memory(controllers))
      most = tightest(root + "/sys/fs/cgroup/memory", group, "memory.limit_in_bytes", most);
  }
  return most;
}

// Not getrusage: its maximum is at first that of the program that started this one.
int64_t peak_resident_bytes(const std::string& root) {
  std::ifstream status(root + "/proc/self/status");
  constexpr std::string_view kName = "VmHWM:";  // then a number of KiB
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(kName)) return 1024 * std::atoll(line.c_str() + kName.size());
  }
  return 0;
}

}  // namespace safegrad
