#include "command_mistake.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/json.h"
#include "core/key_lister.h"

namespace safegrad {
namespace {

std::vector<std::string> commands_of(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) names.push_back(command->get_name());
  return names;
}

// "--set", of each option that has a long name; "-q" where it has none.
std::vector<std::string> options_of(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    if (!option->get_lnames().empty())
      names.push_back("--" + option->get_lnames().front());
    else if (!option->get_snames().empty())
      names.push_back("-" + option->get_snames().front());
  }
  return names;
}

std::string meant_in_words(const std::vector<std::string>& meant) {
  return meant.empty() ? "" : fmt::format("; did you mean {}?", fmt::join(meant, " or "));
}

// The keys that an option's name spells, with their sections ("train.steps") or without ("steps").
std::vector<std::string> keys_of(std::string name) {
  name.erase(0, name.find_first_not_of('-'));
  std::replace(name.begin(), name.end(), '-', '_');
  std::vector<std::string> found;
  for (const std::string& key : list_keys<RunConfig>("").all) {
    if (!name.empty() && (key == name || key.ends_with("." + name))) found.push_back(key);
  }
  return found;
}

// `words`: the option as it was typed, and what follows it.
std::string unknown_option(const CLI::App& command, const std::vector<std::string>& words) {
  const size_t equals = words[0].find('=');
  const std::string name = words[0].substr(0, equals);
  std::string value = "VALUE";
  if (equals != std::string::npos)
    value = words[0].substr(equals + 1);
  else if (words.size() > 1 && !words[1].starts_with('-'))
    value = words[1];
  const std::vector<std::string> options = options_of(command);
  std::vector<std::string> meant;
  if (std::string nearest = nearest_name(name, options); !nearest.empty())
    meant.push_back(std::move(nearest));
  if (command.get_option_no_throw("--set")) {
    for (const std::string& key : keys_of(name))
      meant.push_back(fmt::format("--set {}={}", key, printable(value)));
  }
  return fmt::format("no such option: {}{} (there are: {})", printable(name), meant_in_words(meant),
                     fmt::join(options, ", "));
}

}  // namespace

std::string mistake_in_words(const CLI::App& app, const CLI::ParseError& error) {
  const std::vector<CLI::App*> chosen = app.get_subcommands();
  const CLI::App& command = chosen.empty() ? app : *chosen.front();
  const std::string spelled = chosen.empty() ? "safegrad" : "safegrad " + command.get_name();
  const std::vector<std::string> words = app.remaining(true);
  const bool incomplete = dynamic_cast<const CLI::RequiredError*>(&error);
  const bool left_over = incomplete || dynamic_cast<const CLI::ExtrasError*>(&error);
  std::string text = error.what();
  if (left_over && !words.empty() && words[0].starts_with('-')) {
    text = unknown_option(command, words);
  } else if (left_over && !words.empty() && chosen.empty()) {
    const std::vector<std::string> commands = commands_of(app);
    const std::string nearest = nearest_name(words[0], commands);
    text = fmt::format("no such command: {}{} (there are: {})", printable(words[0]),
                       nearest.empty() ? "" : meant_in_words({nearest}), fmt::join(commands, ", "));
  } else if (left_over && !words.empty()) {
    text = fmt::format("{} is one argument too many", printable(words[0]));
  } else if (chosen.empty() && incomplete) {
    text = fmt::format("a command is missing (there are: {})", fmt::join(commands_of(app), ", "));
  }
  return fmt::format("{}{}; {} --help says more", chosen.empty() ? "" : command.get_name() + ": ",
                     text, spelled);
}

}  // namespace safegrad
