// main.cpp: the command line; finds the other ranks, runs one command, turns errors into one
// message and an exit code.
#include <exception>
#include <functional>
#include <memory>
#include <string>

#include <ATen/Parallel.h>
#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <malloc.h>

#include "command_mistake.h"
#include "commands.h"
#include "core/config_schema.h"
#include "core/error.h"
#include "dist/job_failed.h"
#include "dist/launcher.h"
#include "inspect.h"

namespace {

using safegrad::CommandLine;

constexpr int64_t kMostRanks = 1 << 20, kMostTokens = 1 << 24, kMostSamples = 1 << 30;

constexpr const char* kIntroduction =
    "Fine-tunes a language model on many workers without losing its safety (SafeGrad, "
    "arXiv:2508.07172).\n\n"
    "  safegrad check configs/quickstart.yaml                    is the config right?\n"
    "  mpirun -n 2 safegrad train configs/quickstart.yaml        train on two ranks\n"
    "  mpirun -n 2 safegrad audit configs/quickstart.yaml        which samples work against "
    "safety?\n"
    "  safegrad plan my.yaml --ranks 8,64 --device h100          what would it take?\n"
    "  srun --mpi=pmix -n 8 safegrad train my.yaml --set train.seed=1\n"
    "  safegrad inspect runs/quickstart/safegrad                 what is this folder?\n\n"
    "A run folder (config key `output`) receives config.yaml, metrics.jsonl and model/, which "
    "transformers loads.\n"
    "Exit codes: 0 done, 1 a mistake in what was given, 2 a failure while running, 75 stopped on "
    "request (Ctrl-C, SIGTERM, SIGUSR1) with a checkpoint.";

// One word in the help, which completion reads there; a mistake is told the range.
CLI::Range whole_number(int64_t least, int64_t most) {
  return CLI::Range(least, most, least > 0 ? "POSITIVE" : "NONNEGATIVE");
}

// Large activations are made and freed at every step. Kept in the heap they need no new pages from
// the kernel each time.
void keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
}

void add_options(CLI::App& command, CommandLine& line) {
  command.add_option("config", line.config, "YAML file; every key is described in docs/config.md")
      ->required();
  command
      .add_option("--set", line.overrides,
                  "override a key, e.g. --set optimizer.lr=2e-5 (repeatable)")
      ->type_name("KEY=VALUE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command.add_flag("-q,--quiet", line.quiet, "print errors only");
}

void add_verbose(CLI::App& command, CommandLine& line, const char* text) {
  command.add_flag("-v,--verbose", line.verbose, text)->excludes("--quiet");
}

// Commands of one process, without ranks.
void add_local(CLI::App& app, std::function<std::string()>& command, std::string& path) {
  app.add_subcommand("schema", "print the JSON schema of a config, for editors")->callback([&] {
    command = safegrad::config_schema;
  });
  CLI::App* inspect = app.add_subcommand(
      "inspect",
      "say what a token file or a folder of a model, adapter, run, checkpoint or audit is");
  inspect->add_option("path", path, "file or folder")->required();
  inspect->callback([&] { command = [&path] { return safegrad::inspect(path); }; });
}

int run_local(const std::function<std::string()>& command) {
  try {
    fmt::print("{}", command());
    return 0;
  } catch (const safegrad::Error& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    return 2;
  }
}

void add_resume(CLI::App& train, CommandLine& line) {
  CLI::Option* resume =
      train
          .add_option("--resume", line.resume,
                      "go on from a checkpoint: its folder, or auto for the newest in the output "
                      "folder (without any: from the beginning)")
          ->type_name("auto|FOLDER");
  train
      .add_flag("--allow-change", line.allow_change,
                "go on although the config or the data are not those of the checkpoint")
      ->needs(resume);
}

void add_audit(CLI::App& audit, CommandLine& line) {
  audit.add_option("--top", line.top, "samples to print, the worst first (20)")
      ->type_name("N")
      ->check(whole_number(0, kMostSamples));
  audit
      .add_option("--steps", line.steps, "of plain fine-tuning before the samples are scored (10)")
      ->type_name("N")
      ->check(whole_number(0, kMostSamples));
}

void add_plan(CLI::App& plan, safegrad::PlanOptions& options) {
  plan.add_option("--ranks", options.ranks, "numbers of ranks, e.g. 8 or 1,8,64,1024")
      ->required()
      ->delimiter(',')
      ->allow_extra_args(false)  // what follows is the config
      ->type_name("N,...")
      ->check(whole_number(1, kMostRanks));
  plan.add_option("--device", options.device,
                  "a100, h100, h200, cpu (measured here), or a name of --figures")
      ->type_name("NAME");
  plan.add_option("--network", options.network,
                  "between machines: ib-200, ib-400, eth-100, or a name of --figures")
      ->type_name("NAME");
  plan.add_option("--ranks-per-node", options.ranks_per_node, "ranks of one machine")
      ->type_name("N")
      ->check(whole_number(1, kMostRanks));
  plan.add_option("--figures", options.figures,
                  "YAML file with figures of devices and networks (docs/plan.md)")
      ->type_name("FILE");
  CLI::Option* tokens = plan.add_option("--tokens-per-sequence", options.tokens,
                                        "length of every sequence, in place of the data files")
                            ->type_name("N")
                            ->check(whole_number(2, kMostTokens));
  plan.add_option("--scored-per-sequence", options.scored, "of those (all but the first)")
      ->type_name("N")
      ->check(whole_number(1, kMostTokens))
      ->needs(tokens);
  plan.add_flag("--run", options.run,
                "run a step of one rank here and compare memory and traffic (CPU)");
  plan.add_flag("--json", options.json, "one JSON line for each number of ranks");
}

}  // namespace

int main(int argc, char** argv) {
  keep_freed_memory();
  CommandLine line;
  std::function<int(const CommandLine&, safegrad::dist::Launcher&)> command;
  CLI::App app(kIntroduction, "safegrad");
  app.set_version_flag("--version", "safegrad " SAFEGRAD_VERSION);
  app.require_subcommand(1);
  auto add = [&](const char* name, const char* text, auto function) {
    CLI::App* sub = app.add_subcommand(name, text);
    add_options(*sub, line);
    sub->callback([&command, function] { command = function; });
    return sub;
  };
  CLI::App* train =
      add("train", "train as the config says and write the run folder", safegrad::train);
  add_verbose(*train, line,
              "also print each rank's host, device and threads, the files that were opened, and "
              "where the time before the first step went");
  add_resume(*train, line);
  CLI::App* check =
      add("check", "check the config, the model's and the data's headers; run nothing",
          safegrad::check);
  add_verbose(*check, line, "also print the files that were opened");
  check
      ->add_option("--ranks", line.ranks,
                   "check for this many ranks; default: those that were started")
      ->check(whole_number(1, kMostRanks));
  add("evaluate", "score the config's model on its probes; prints JSON", safegrad::evaluate);
  add_audit(*add("audit", "rank the task samples by how much each works against alignment",
                 safegrad::audit),
            line);
  add_plan(*add("plan", "memory, traffic and time of a run on any number of ranks; runs nothing",
                safegrad::plan),
           line.plan);
  std::function<std::string()> local;
  std::string path;
  add_local(app, local, path);
  std::string mistake;
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    mistake = safegrad::mistake_in_words(app, e);
  }
  if (local && mistake.empty()) return run_local(local);

  std::unique_ptr<safegrad::dist::Launcher> launcher;
  std::string speaker;
  auto fail = [&](const std::exception& e, int exit_code) {
    fmt::print(stderr, "error: {}{}\n", speaker, e.what());
    std::fflush(stderr);
    if (launcher) launcher->abort(exit_code);
    return exit_code;
  };
  try {
    launcher = safegrad::dist::make_launcher(&argc, &argv);
    const int rank = launcher->control().rank();
    speaker = fmt::format("rank {}: ", rank);
    // A rank may have been given another command line than the others; one of them tells.
    safegrad::dist::agree(launcher->control(),
                          [&] { SAFEGRAD_CHECK(mistake.empty(), InputError, "{}", mistake); });
    return command(line, *launcher);
  } catch (const safegrad::dist::JobFailed& e) {
    if (*e.what()) fmt::print(stderr, "error: {}\n", e.what());
    return e.exit_code();
  } catch (const safegrad::Error& e) {
    return fail(e, e.exit_code());
  } catch (const std::exception& e) {
    return fail(e, 2);
  }
}
