// file_lock.h: keeps two jobs from writing to one folder; no crash leaves it locked.
#pragma once
#include <filesystem>
#include <memory>
#include <string>

namespace safegrad {

/// A lock on a file that one process at a time can hold, on any machine. The kernel frees it with
/// the last descriptor, so SIGKILL leaves nothing behind: the file stays, and says nothing. It is a
/// byte-range lock of the open file (F_OFD_SETLK): NFS and the cluster file systems hand these to
/// their server, whereas flock() reaches this machine alone on some of them; unlike an older POSIX
/// lock it does not go away when some other part of the process closes the same file. An NFSv4
/// server frees the locks of a client that crashed when their lease ends (usually 90 s); NFSv3
/// keeps them until that client is back, or the file is removed.
class FileLock {
 public:
  /// The lock on `path`, which is made if need be; null if this file system has no locks. While it
  /// is held the file names the holder: host, process, time. Does not wait. Throws InputError that
  /// begins with `what` and names the holder if somebody else has it; RunError (path and the
  /// system's text).
  static std::unique_ptr<FileLock> take(const std::string& path, const std::string& what);
  ~FileLock();  ///< empties the file and frees it
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  explicit FileLock(int descriptor) : descriptor_(descriptor) {}
  void name_holder() const;
  void open_to(const std::filesystem::path& folder) const;

  int descriptor_;
};

}  // namespace safegrad
