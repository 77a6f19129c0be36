#include "core/hardware.h"

#include <algorithm>
#include <charconv>
#include <utility>
#include <vector>

#include <fmt/ranges.h>

#include "core/error.h"
#include "core/files.h"
#include "core/yaml_parser.h"

namespace safegrad {
namespace {

template <typename Map>
const auto& named(const Map& map, const std::string& name, const char* what) {
  const auto found = map.find(name);
  if (found != map.end()) return found->second;
  std::vector<std::string> names;
  for (const auto& [known, figures] : map) names.push_back(known);
  throw InputError(fmt::format("{}: got \"{}\"; known: {}; --figures FILE adds others", what, name,
                               fmt::join(names, ", ")));
}

// Reads the members of one map into a struct: each key has a place of its type.
class Figures {
 public:
  Figures(const std::string& file, const YamlValue& map, std::string where)
      : file_(file), map_(map), where_(std::move(where)) {
    if (map.kind != YamlValue::Kind::map)
      fail_at(file, map.line, where_, "got " + shown(map) + "; allowed: a section");
  }

  void number(const char* key, double& place, bool may_be_zero = false) {
    if (const YamlValue* value = take(key)) {
      double got = 0;
      const char* end = value->text.data() + value->text.size();
      const auto [stop, failed] = std::from_chars(value->text.data(), end, got);
      if (value->kind != YamlValue::Kind::scalar || failed != std::errc() || stop != end ||
          !(may_be_zero ? got >= 0 : got > 0) || got > 1e12) {
        refuse(*value, may_be_zero ? "a number >= 0" : "a number > 0");
      }
      place = got;
    }
  }
  void count(const char* key, int64_t& place) {
    double value = static_cast<double>(place);
    number(key, value);
    place = static_cast<int64_t>(value);
    if (static_cast<double>(place) != value) refuse(*map_.find(key), "a whole number > 0");
  }
  void flag(const char* key, bool& place) {
    if (const YamlValue* value = take(key)) {
      if (value->text != "true" && value->text != "false") refuse(*value, "true, false");
      place = value->text == "true";
    }
  }
  void name(const char* key, std::string& place) {
    if (const YamlValue* value = take(key)) {
      if (value->kind != YamlValue::Kind::scalar) refuse(*value, "the name of a network");
      place = value->text;
    }
  }
  /// Refuses keys that none of the above asked for.
  void finish() const {
    for (const YamlValue& child : map_.children) {
      if (std::find(known_.begin(), known_.end(), child.key) != known_.end()) continue;
      fail_at(file_, child.line, where_ + "." + child.key,
              fmt::format("no such key ({} has: {})", where_, fmt::join(known_, ", ")));
    }
  }

 private:
  const YamlValue* take(const char* key) {
    known_.emplace_back(key);
    return map_.find(key);
  }
  [[noreturn]] void refuse(const YamlValue& value, const char* allowed) const {
    fail_at(file_, value.line, where_ + "." + value.key,
            fmt::format("got {}; allowed: {}", shown(value), allowed));
  }

  const std::string& file_;
  const YamlValue& map_;
  std::string where_;
  std::vector<std::string> known_;
};

void read(Figures& figures, DeviceFigures& d) {
  figures.number("memory_gib", d.memory_gib);
  figures.number("reserve_gib", d.reserve_gib, true);
  figures.number("bfloat16_tflops", d.bfloat16_tflops);
  figures.number("float32_tflops", d.float32_tflops);
  figures.number("tf32_tflops", d.tf32_tflops);
  figures.number("gemm_share", d.gemm_share);
  figures.number("memory_gb_per_s", d.memory_gb_per_s);
  figures.flag("gpu", d.gpu);
  figures.flag("overlaps", d.overlaps);
  figures.count("ranks_per_node", d.ranks_per_node);
  figures.name("inside", d.inside);
  figures.name("between", d.between);
  figures.finish();
}

void read(Figures& figures, NetworkFigures& n) {
  figures.number("gb_per_s", n.gb_per_s);
  figures.number("share", n.share);
  figures.number("latency_us", n.latency_us, true);
  figures.finish();
}

template <typename Map>
void read_section(const std::string& file, const YamlValue& root, const char* section, Map& map) {
  const YamlValue* found = root.find(section);
  if (!found) return;
  if (found->kind != YamlValue::Kind::map)
    fail_at(file, found->line, section, "got " + shown(*found) + "; allowed: a section");
  for (const YamlValue& entry : found->children) {
    Figures figures(file, entry, fmt::format("{}.{}", section, entry.key));
    read(figures, map[entry.key]);
  }
}

void check_complete(const std::string& file, const Hardware& hardware) {
  for (const auto& [name, d] : hardware.devices) {
    const bool measured = !d.gpu && name == "cpu";
    SAFEGRAD_CHECK(measured || (d.memory_gib > d.reserve_gib && d.bfloat16_tflops > 0 &&
                                d.float32_tflops > 0 && d.memory_gb_per_s > 0),
                   ConfigError,
                   "{}: devices.{}: memory_gib (more than reserve_gib), bfloat16_tflops, "
                   "float32_tflops and memory_gb_per_s are needed",
                   file, name);
    hardware.network(d.inside);
    hardware.network(d.between);
  }
  for (const auto& [name, n] : hardware.networks) {
    SAFEGRAD_CHECK(n.gb_per_s > 0, ConfigError, "{}: networks.{}: gb_per_s is needed", file, name);
  }
}

}  // namespace

const DeviceFigures& Hardware::device(const std::string& name) const {
  return named(devices, name, "device");
}

const NetworkFigures& Hardware::network(const std::string& name) const {
  return named(networks, name, "network");
}

// Rates: the makers' data sheets (SXM cards, dense). Memory: what the driver shows. Hopper's
// gemm_share is fitted to whole steps of bench_step on an H200 (docs/plan.md); other shares,
// reserves and latencies are assumptions, to be replaced by measurements (bench_collectives,
// bench_step).
Hardware known_hardware() {
  DeviceFigures a100{.memory_gib = 80.0,
                     .reserve_gib = 3,
                     .bfloat16_tflops = 312,
                     .float32_tflops = 19.5,
                     .tf32_tflops = 156,
                     .gemm_share = 0.7,
                     .memory_gb_per_s = 2039,
                     .gpu = true,
                     .overlaps = true,
                     .ranks_per_node = 8,
                     .inside = "nvlink3",
                     .between = "ib-200"};
  DeviceFigures h100 = a100;
  h100.memory_gib = 79.6;
  h100.bfloat16_tflops = 989;
  h100.float32_tflops = 67;
  h100.tf32_tflops = 494;
  h100.gemm_share = 0.54;
  h100.memory_gb_per_s = 3350;
  h100.inside = "nvlink4";
  h100.between = "ib-400";
  DeviceFigures h200 = h100;
  h200.memory_gib = 140.4;
  h200.memory_gb_per_s = 4800;
  const DeviceFigures cpu{.inside = "shared-memory", .between = "eth-100"};
  return {{{"a100", a100}, {"h100", h100}, {"h200", h200}, {"cpu", cpu}},
          {{"nvlink3", {300, 0.8, 2}},
           {"nvlink4", {450, 0.8, 2}},
           {"ib-200", {25, 0.8, 5}},
           {"ib-400", {50, 0.8, 5}},
           {"eth-100", {12.5, 0.7, 20}},
           {"shared-memory", {3, 1, 1}}}};
}

void read_hardware(const std::string& path, Hardware& hardware) {
  const YamlValue root = parse_yaml(path, "", read_small_file(path, 1 << 20));
  if (root.kind != YamlValue::Kind::map)
    fail_at(path, root.line, "", "got " + shown(root) + "; allowed: devices, networks");
  for (const YamlValue& section : root.children) {
    if (section.key != "devices" && section.key != "networks")
      fail_at(path, section.line, section.key, "no such key; allowed: devices, networks");
  }
  read_section(path, root, "devices", hardware.devices);
  read_section(path, root, "networks", hardware.networks);
  check_complete(path, hardware);
}

}  // namespace safegrad
