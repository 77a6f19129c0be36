// job.h: what a command needs of a config, opened and checked on every rank.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "commands.h"
#include "core/config.h"
#include "core/config_place.h"
#include "device.h"
#include "dist/trainer.h"
#include "models/open_model.h"

namespace safegrad {

struct Job {
  RunConfig config;
  std::unique_ptr<RunDevice> device;  ///< null for check of a config that names a GPU
  models::OpenedModel model;
  dist::RunData data;
  std::vector<std::string> warnings;
};

enum class Purpose { train, check, evaluate, audit };

/// Reads the config, chooses the device, opens model and data, and checks all that can be checked
/// before anything is written: among it that all ranks have the same program, command, config,
/// model and data. Collective; JobFailed.
Job open_job(const CommandLine& line, dist::Launcher& launcher, Purpose purpose);

/// Runs `body`, which may open what the config's keys name; errors of it say where the config gives
/// the key: NamedFileError becomes InputError "my.yaml:9: data.task: message", ConfigError is given
/// the config's file.
template <typename Body>
auto in_config(const CommandLine& line, const Body& body) {
  try {
    return body();
  } catch (const NamedFileError& e) {
    throw InputError(
        fmt::format("{}: {}", place_of(line.config, line.overrides, e.key()), e.message()));
  } catch (const ConfigError& e) {
    throw ConfigError(fmt::format("{}: {}", line.config, e.what()));
  }
}

/// Opens the config's model with `open(section, seed, backend)`, one of open_model.h. Throws
/// ConfigError, or NamedFileError of the key that names the model.
template <typename Open>
models::OpenedModel open_named_model(const RunConfig& config, const Backend& backend, Open open) {
  try {
    return open(config.model, config.train.seed, backend);
  } catch (const ConfigError&) {
    throw;
  } catch (const InputError& e) {
    throw NamedFileError(config.model.path.empty() ? "model.config" : "model.path", e.what());
  }
}

/// "host, process 123" of this rank.
std::string process_in_words();

/// On rank 0, unless the command line says quiet.
void print_warnings(const std::vector<std::string>& warnings, const CommandLine& line,
                    const dist::ControlPlane& world);

}  // namespace safegrad
