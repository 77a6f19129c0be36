// temp_folder.h: a folder of files that lasts as long as a test, and what tests ask of exceptions.
#pragma once
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include <gtest/gtest.h>
#include <stdlib.h>

#include "core/safetensors.h"

namespace safegrad::test {

/// An empty folder, removed with everything in it at the end.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "safegrad.XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) {
      throw std::system_error(errno, std::generic_category(), pattern);
    }
    path_ = pattern;
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline void write_text(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string read_text(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

/// The bytes of a safetensors file with this header text, whatever it says.
inline std::string with_header(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out + header + data;
}

struct TestTensor {
  SafetensorsWriter::Entry entry;
  std::string bytes;
};

template <class T>
TestTensor tensor_of(std::string name, Dtype dtype, std::vector<int64_t> shape,
                     const std::vector<T>& values) {
  return {{std::move(name), dtype, std::move(shape)},
          std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T))};
}

inline void write_tensors(const std::string& path, const std::vector<TestTensor>& tensors,
                          const std::map<std::string, std::string>& metadata = {}) {
  std::vector<SafetensorsWriter::Entry> entries;
  for (const auto& tensor : tensors) entries.push_back(tensor.entry);
  SafetensorsWriter writer(path, entries, metadata);
  for (const auto& tensor : tensors) writer.append(std::as_bytes(std::span(tensor.bytes)));
  writer.finish();
}

/// The message of the `Kind` that `body` throws; a failure if it throws nothing or another kind.
template <class Kind, class Body>
std::string message_of(Body&& body) {
  try {
    body();
  } catch (const Kind& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another kind of exception: " << error.what();
    return "";
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

/// Checks that `body` throws `Kind` with every one of `parts` in its message.
template <class Kind, class Body>
void expect_refused(Body&& body, const std::vector<std::string>& parts) {
  const std::string message = message_of<Kind>(body);
  for (const auto& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << "\"" << part << "\" is not in: " << message;
  }
}

}  // namespace safegrad::test
