#include "core/file_lock.h"

#include <cerrno>
#include <ctime>
#include <filesystem>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"

namespace safegrad {
namespace {

constexpr int64_t kMaxHolderBytes = 1024;

std::string describe_this_process() {
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  return fmt::format("process {} on {} since {:%Y-%m-%d %H:%M:%S} UTC", ::getpid(), host,
                     fmt::gmtime(std::time(nullptr)));
}

// Where locks are mandatory the file cannot be read; and its holder may not have written it yet.
std::string read_holder(const std::string& path) {
  std::string holder;
  try {
    holder = read_small_file(path, kMaxHolderBytes);
  } catch (const InputError&) {
  }
  return holder.empty() ? "another job" : printable(holder);
}

}  // namespace

std::unique_ptr<FileLock> FileLock::take(const std::string& path, const std::string& what) {
  const int descriptor = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  SAFEGRAD_CHECK(descriptor >= 0, RunError, "{}: cannot open: {}", path,
                 std::generic_category().message(errno));
  std::unique_ptr<FileLock> lock(new FileLock(descriptor));
  lock->open_to(std::filesystem::path(path).parent_path());
  struct flock whole {};
  whole.l_type = F_WRLCK;
  whole.l_whence = SEEK_SET;
  if (::fcntl(descriptor, F_OFD_SETLK, &whole) == 0) {
    lock->name_holder();
    return lock;
  }
  const int error = errno;
  ::close(std::exchange(lock->descriptor_, -1));
  SAFEGRAD_CHECK(error != EAGAIN && error != EACCES, InputError, "{} is in use by {}", what,
                 read_holder(path));
  if (error == ENOLCK || error == ENOSYS || error == EOPNOTSUPP) return nullptr;
  throw RunError(
      fmt::format("{}: cannot be locked: {}", path, std::generic_category().message(error)));
}

// Whoever may write to the folder may lock it, whatever this process's umask: a colleague goes on
// with the run.
void FileLock::open_to(const std::filesystem::path& folder) const {
  struct stat of_folder {
  }, own{};
  if (::stat(folder.c_str(), &of_folder) != 0 || ::fstat(descriptor_, &own) != 0) return;
  if (own.st_uid == ::geteuid()) [[maybe_unused]]
    const int done = ::fchmod(descriptor_, of_folder.st_mode & 0666);
}

// It only serves a message: what cannot be written is left out.
void FileLock::name_holder() const {
  const std::string holder = describe_this_process();
  if (::ftruncate(descriptor_, 0) == 0) [[maybe_unused]]
    const ssize_t written = ::pwrite(descriptor_, holder.data(), holder.size(), 0);
}

FileLock::~FileLock() {
  if (descriptor_ < 0) return;
  // Not removed: a lock on a file without a name would keep out nobody who comes after.
  [[maybe_unused]] const int only_for_messages = ::ftruncate(descriptor_, 0);
  ::close(descriptor_);
}

}  // namespace safegrad
