// fuzz_config.cpp: any bytes as a YAML config with overrides: what is taken can be written, and is
// read back as the same.
#include <vector>

#include "core/config.h"
#include "fuzz/fuzz_input.h"

// The input: the file, then the values of --set, with a zero byte between them.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace safegrad;
  std::string_view rest = fuzz::as_text(data, size);
  const fuzz::MemoryFile file(fuzz::take_part(rest));
  std::vector<std::string> overrides;
  while (!rest.empty()) overrides.emplace_back(fuzz::take_part(rest));

  RunConfig config;
  if (!fuzz::takes([&] { config = load_config(file.path(), overrides); })) return 0;
  const fuzz::MemoryFile written(to_yaml(config));
  const RunConfig again = load_config(written.path(), {});
  fuzz::require(config_values(again) == config_values(config), "a config is read as written");
  return 0;
}
