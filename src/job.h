// job.h: what a command needs of a config, opened and checked on every rank.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "commands.h"
#include "core/config.h"
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

enum class Purpose { train, check, evaluate };

/// Reads the config, chooses the device, opens model and data, and checks all that can be checked
/// before anything is written: among it that all ranks have the same program, command, config,
/// model and data. Collective; JobFailed.
Job open_job(const CommandLine& line, dist::Launcher& launcher, Purpose purpose);

/// On rank 0, unless the command line says quiet.
void print_warnings(const std::vector<std::string>& warnings, const CommandLine& line,
                    const dist::ControlPlane& world);

}  // namespace safegrad
