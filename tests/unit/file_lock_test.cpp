#include "core/file_lock.h"

#include <csignal>

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/error.h"
#include "unit/temp_folder.h"

namespace safegrad {
namespace {

using test::expect_refused;
using test::read_text;
using test::TempFolder;
using test::write_text;

TEST(FileLock, ASecondOneIsToldWhoHoldsIt) {
  const TempFolder folder;
  const std::string path = folder / "lock";
  auto first = FileLock::take(path, "the folder");
  if (!first) GTEST_SKIP() << "no locks on this file system";
  expect_refused<InputError>(
      [&] { FileLock::take(path, "the folder"); },
      {"the folder is in use by process " + std::to_string(::getpid()) + " on ", " since 20"});

  first.reset();
  EXPECT_EQ(read_text(path), "");
  EXPECT_TRUE(FileLock::take(path, "the folder"));
}

// An older kind of lock would be lost with the first descriptor that the process closes.
TEST(FileLock, ReadingTheFileDoesNotFreeIt) {
  const TempFolder folder;
  const auto lock = FileLock::take(folder / "lock", "it");
  if (!lock) GTEST_SKIP() << "no locks on this file system";
  EXPECT_NE(read_text(folder / "lock"), "");

  expect_refused<InputError>([&] { FileLock::take(folder / "lock", "it"); }, {"in use"});
}

TEST(FileLock, AHolderThatIsKilledLeavesItFree) {
  const TempFolder folder;
  const std::string path = folder / "lock";
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t holder = ::fork();
  if (holder == 0) {
    const auto lock = FileLock::take(path, "it");
    const char held = lock ? 'y' : 'n';
    if (::write(ready[1], &held, 1) == 1) ::pause();
    ::_exit(1);
  }
  char held = 0;
  ASSERT_EQ(::read(ready[0], &held, 1), 1);
  if (held == 'y') {
    expect_refused<InputError>([&] { FileLock::take(path, "it"); },
                               {"process " + std::to_string(holder)});
  }
  ::kill(holder, SIGKILL);
  ::waitpid(holder, nullptr, 0);
  if (held != 'y') GTEST_SKIP() << "no locks on this file system";

  EXPECT_NE(read_text(path), "") << "it still names the one that was killed";
  EXPECT_TRUE(FileLock::take(path, "it"));
}

TEST(FileLock, WhatCannotBeOpenedIsNamed) {
  const TempFolder folder;
  expect_refused<RunError>([&] { FileLock::take(folder / "none/lock", "it"); },
                           {folder / "none/lock", "No such file"});
  write_text(folder / "target", "");
  ASSERT_EQ(::symlink((folder / "target").c_str(), (folder / "link").c_str()), 0);
  expect_refused<RunError>([&] { FileLock::take(folder / "link", "it"); }, {folder / "link"});
}

}  // namespace
}  // namespace safegrad
