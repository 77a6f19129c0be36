#include "core/files.h"

#include <cerrno>
#include <filesystem>
#include <system_error>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace safegrad {
namespace {

std::string system_text(int error) {
  return std::generic_category().message(error);
}

}  // namespace

void sync_folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  SAFEGRAD_CHECK(descriptor >= 0, RunError, "{}: cannot open the folder to sync it: {}", folder,
                 system_text(errno));
  const int error = ::fsync(descriptor) == 0 ? 0 : errno;
  ::close(descriptor);
  // Some network file systems have no fsync for folders and say so with EINVAL.
  SAFEGRAD_CHECK(error == 0 || error == EINVAL, RunError, "{}: cannot sync the folder: {}", folder,
                 system_text(error));
}

void make_folders(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code failed;
  std::vector<fs::path> missing;
  for (fs::path p = path; !p.empty() && !fs::is_directory(p, failed); p = p.parent_path()) {
    missing.push_back(p);
    if (p == p.parent_path()) break;
  }
  for (; !missing.empty(); missing.pop_back()) {
    fs::create_directory(missing.back(), failed);
    SAFEGRAD_CHECK(!failed, RunError, "{}: cannot be made: {}", path, failed.message());
    // Also where another rank was faster: whoever goes on relies on it.
    sync_folder_of(missing.back().string());
  }
}

InputFile::InputFile(const std::string& path)
    : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  SAFEGRAD_CHECK(descriptor_ >= 0, InputError, "{}: cannot open: {}; check the path", path,
                 system_text(errno));
  struct stat status {};
  const int error = ::fstat(descriptor_, &status) == 0 ? 0 : errno;
  if (error != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    SAFEGRAD_CHECK(error == 0, InputError, "{}: cannot stat: {}", path, system_text(error));
    throw InputError(fmt::format("{}: is {}, a file is expected; check the path", path,
                                 S_ISDIR(status.st_mode) ? "a folder" : "a pipe or a device"));
  }
  size_ = status.st_size;
}

InputFile::~InputFile() {
  ::close(descriptor_);
}

size_t InputFile::read(std::span<std::byte> out) {
  size_t done = 0;
  while (done < out.size()) {
    const ssize_t n = ::read(descriptor_, out.data() + done, out.size() - done);
    if (n < 0 && errno == EINTR) continue;
    SAFEGRAD_CHECK(n >= 0, InputError, "{}: cannot read: {}", path_, system_text(errno));
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return done;
}

std::string read_small_file(const std::string& path, int64_t max_bytes) {
  InputFile file(path);
  SAFEGRAD_CHECK(file.size() <= max_bytes, InputError,
                 "{}: has {} bytes, at most {} are expected; is this the right file?", path,
                 file.size(), max_bytes);
  std::string text(static_cast<size_t>(file.size()), '\0');
  text.resize(file.read(std::as_writable_bytes(std::span(text))));
  return text;
}

AtomicFile::AtomicFile(std::string path)
    : path_(std::move(path)),
      temporary_(path_ + ".tmp"),
      stream_(std::fopen(temporary_.c_str(), "wbe")) {
  SAFEGRAD_CHECK(stream_ != nullptr, RunError, "{}: cannot create: {}", temporary_,
                 system_text(errno));
}

AtomicFile::~AtomicFile() {
  discard();
}

void AtomicFile::discard() noexcept {
  if (stream_ == nullptr) return;
  std::fclose(stream_);
  stream_ = nullptr;
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* action) {
  const std::string text = system_text(errno);
  discard();
  throw RunError(fmt::format("{}: cannot {} {}: {}", path_, action, temporary_, text));
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  SAFEGRAD_CHECK(stream_ != nullptr, UsageError, "{}: written after its end or a failure", path_);
  if (bytes.empty()) return;
  if (std::fwrite(bytes.data(), 1, bytes.size(), stream_) != bytes.size()) fail("write");
}

void AtomicFile::sync() {
  SAFEGRAD_CHECK(stream_ != nullptr, UsageError, "{}: synced after its end or a failure", path_);
  if (std::fflush(stream_) != 0) fail("write");
  if (::fdatasync(::fileno(stream_)) != 0) fail("sync");
}

void AtomicFile::commit() {
  SAFEGRAD_CHECK(stream_ != nullptr, UsageError, "{}: committed after its end or a failure", path_);
  if (std::fflush(stream_) != 0) fail("write");
  if (::fsync(::fileno(stream_)) != 0) fail("sync");
  // fclose comes after the rename, so that a failure up to here still owns the temporary file.
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename");
  std::FILE* const stream = std::exchange(stream_, nullptr);
  SAFEGRAD_CHECK(std::fclose(stream) == 0, RunError, "{}: cannot close: {}", path_,
                 system_text(errno));
  sync_folder_of(path_);
}

void write_file_atomically(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(std::as_bytes(std::span(content)));
  file.commit();
}

}  // namespace safegrad
