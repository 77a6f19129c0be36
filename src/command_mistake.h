// command_mistake.h: a mistyped command line, in words.
#pragma once
#include <string>

#include <CLI/CLI.hpp>

namespace safegrad {

/// What is wrong with the command line that `app` refused with `error`: for an unknown command or
/// option what was probably meant (the nearest right one, or --set of the config's key of that
/// name) and all that there are; and which --help says more. One line.
std::string mistake_in_words(const CLI::App& app, const CLI::ParseError& error);

}  // namespace safegrad
