// disk_shim.cpp: a disk that is slow, that lies, that hangs, or that keeps a diary, for tests.
// disk.py builds it and puts it between a rank and the C library (LD_PRELOAD).
//
//   SAFEGRAD_TEST_DISK_SLOW_US  every write, sync and renaming below a folder named `checkpoints`
//                               takes so many microseconds longer
//   SAFEGRAD_TEST_DISK_FLIP     in files whose path has this in it one bit of what is written
//                               differs
//   SAFEGRAD_TEST_DISK_HANG     the sync, the renaming to, and the listing of a path that ends in
//                               this never come back
//   SAFEGRAD_TEST_DISK_DIARY    file to which a line for each sync, renaming and new folder goes
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

const char* setting(const char* name) {
  return std::getenv((std::string("SAFEGRAD_TEST_DISK_") + name).c_str());
}

template <class Function>
Function* real(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

std::string path_of(int descriptor) {
  char path[4096];
  const ssize_t n =
      ::readlink(("/proc/self/fd/" + std::to_string(descriptor)).c_str(), path, sizeof path);
  return {path, n > 0 ? static_cast<size_t>(n) : 0};
}

std::string absolute(const char* path) {
  char folder[4096];
  if (path[0] == '/' || !::getcwd(folder, sizeof folder)) return path;
  return std::string(folder) + "/" + path;
}

void wait_for_disk(const std::string& path) {
  const char* us = setting("SLOW_US");
  if (us && path.find("/checkpoints") != std::string::npos)
    ::usleep(static_cast<useconds_t>(std::atoi(us)));
}

void hang_at(const std::string& path) {
  const char* end = setting("HANG");
  while (end && path.size() >= std::strlen(end) &&
         path.compare(path.size() - std::strlen(end), std::string::npos, end) == 0) {
    ::pause();
  }
}

void note(const std::string& line) {
  const char* diary = setting("DIARY");
  if (!diary) return;
  const int descriptor = ::open(diary, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  const std::string text = line + "\n";
  if (::write(descriptor, text.data(), text.size()) < 0) std::abort();
  ::close(descriptor);
}

}  // namespace

extern "C" {

size_t fwrite(const void* data, size_t size, size_t count, std::FILE* stream) {
  static auto* const next = real<decltype(fwrite)>("fwrite");
  const char *flip = setting("FLIP"), *slow = setting("SLOW_US");
  if (!flip && !slow) return next(data, size, count, stream);
  const std::string path = path_of(::fileno(stream));
  wait_for_disk(path);
  // A file that is damaged in its header is no safetensors file any more: too easily found.
  const bool header = size * count <= 8 || *static_cast<const char*>(data) == '{';
  if (!flip || header || path.find(flip) == std::string::npos)
    return next(data, size, count, stream);
  std::vector<char> changed(size * count);
  std::memcpy(changed.data(), data, changed.size());
  changed.back() = static_cast<char>(changed.back() ^ 1);
  return next(changed.data(), size, count, stream);
}

int fsync(int descriptor) {
  const std::string path = path_of(descriptor);
  wait_for_disk(path);
  hang_at(path);
  const int result = real<decltype(fsync)>("fsync")(descriptor);
  note("sync " + path);
  return result;
}

int rename(const char* from, const char* to) {
  wait_for_disk(absolute(to));
  hang_at(absolute(to));
  const int result = real<decltype(rename)>("rename")(from, to);
  note("rename " + absolute(to));
  return result;
}

int mkdir(const char* path, mode_t mode) {
  const int result = real<decltype(mkdir)>("mkdir")(path, mode);
  if (result == 0) note("mkdir " + absolute(path));
  return result;
}

// How libstdc++ lists a folder: by one or the other.
int openat(int folder, const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if ((flags & O_DIRECTORY) != 0) hang_at(absolute(path));
  return real<int(int, const char*, int, ...)>("openat")(folder, path, flags, mode);
}

DIR* opendir(const char* path) {
  hang_at(absolute(path));
  return real<decltype(opendir)>("opendir")(path);
}

}  // extern "C"
