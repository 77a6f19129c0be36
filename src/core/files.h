// files.h: reading of files that may be anything, and writing of files that are whole or untouched.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "core/error.h"

namespace safegrad {

/// A regular file opened for reading. Folders, pipes and devices are refused, without waiting for a
/// pipe's writer. Throws InputError (path and the system's text).
class InputFile {
 public:
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  int descriptor() const { return descriptor_; }
  int64_t size() const { return size_; }  ///< when it was opened
  /// Fills as much of `out` as the file still has; returns the bytes read, 0 at the end.
  size_t read(std::span<std::byte> out);

 private:
  std::string path_;
  int descriptor_;
  int64_t size_ = 0;
};

/// The whole file. Throws InputError if it cannot be read or has more than `max_bytes`.
std::string read_small_file(const std::string& path, int64_t max_bytes);

/// A file that appears under `path` only when it is complete: data goes to `path` + ".tmp";
/// commit() fsyncs it, renames it and fsyncs the folder. Without commit(), or after a failure, the
/// temporary file is removed. Throws RunError (path and the system's text); UsageError when used
/// after commit() or after a failure.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void sync();  ///< waits until what was written is on the disk
  void commit();

 private:
  [[noreturn]] void fail(const char* action);
  void discard() noexcept;

  std::string path_, temporary_;
  std::FILE* stream_;
};

/// Makes the folder and those above it that are missing; each is on the disk, in the folder that it
/// is in, when this returns. Throws RunError (path and the system's text).
void make_folders(const std::string& path);

/// Renames and removals in the folder of `path` survive a crash of the machine from here on.
void sync_folder_of(const std::string& path);

/// `path` holds `content` afterwards, or what it held before. Throws like AtomicFile.
void write_file_atomically(const std::string& path, std::string_view content);

/// Calls `body`; an InputError leaves as `Kind` with the same text, so that a model folder's damage
/// is reported as a ModelError whichever reader found it.
template <class Kind, class Body>
auto rethrow_as(Body&& body) -> decltype(body()) {
  try {
    return std::forward<Body>(body)();
  } catch (const InputError& error) {
    throw Kind(error.what());
  }
}

}  // namespace safegrad
