// terminal.h: whether what is printed is seen as it comes, or kept.
#pragma once
#include <cstdio>

namespace safegrad {

/// True if a person watches `stream`: lines may be redrawn. Not where TERM=dumb asks for plain
/// lines, nor for a rank whose mpirun writes to a file.
bool is_terminal(std::FILE* stream);

}  // namespace safegrad
