#include "dist/run_data.h"

#include <fmt/format.h>

#include "core/config_place.h"

namespace safegrad::dist {

RunData open_data(const RunConfig& config, const CausalLM& model,
                  const std::string& tokenizer_sha256, std::vector<std::string>& warnings) {
  const TokenFileExpectation expected{tokenizer_sha256, model.vocab_size(), model.max_positions()};
  auto open = [&](const std::string& key, const std::string& path) {
    try {
      return std::make_shared<const TokenFile>(path, expected, warnings);
    } catch (const InputError& error) {
      throw NamedFileError(key, error.what());
    }
  };
  RunData data;
  if (!config.data.task.empty()) data.task = open("data.task", config.data.task);
  if (config.batch.align_sequences > 0) data.align = open("data.align", config.data.align);
  for (size_t i = 0; i < config.probe.size(); ++i)
    data.probes.push_back(open(fmt::format("probe[{}].file", i), config.probe[i].file));
  return data;
}

}  // namespace safegrad::dist
