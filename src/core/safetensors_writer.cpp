// The writing half of safetensors.h; the reading half is safetensors.cpp.
#include <set>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "core/sha256.h"

namespace safegrad {
namespace {

using nlohmann::json;

struct Layout {
  std::string header;  // padded, so that the data begins at a multiple of 8
  int64_t data_bytes = 0;
};

Layout lay_out(const std::string& path, const std::vector<SafetensorsWriter::Entry>& entries,
               const std::map<std::string, std::string>& metadata) {
  Layout layout;
  json root = json::object();
  if (!metadata.empty()) root["__metadata__"] = metadata;
  std::set<std::string_view> seen{"__metadata__"};
  for (const auto& entry : entries) {
    SAFEGRAD_CHECK(seen.insert(entry.name).second, UsageError,
                   "{}: the tensor name \"{}\" is declared twice or reserved", path,
                   printable(entry.name));
    const auto bytes = byte_count(entry.dtype, entry.shape);
    int64_t end = 0;
    SAFEGRAD_CHECK(bytes && !__builtin_add_overflow(layout.data_bytes, *bytes, &end), UsageError,
                   "{}: tensor \"{}\" has the impossible shape [{}]", path, printable(entry.name),
                   fmt::join(entry.shape, ", "));
    root[entry.name] = {{"dtype", name_of(entry.dtype)},
                        {"shape", entry.shape},
                        {"data_offsets", {layout.data_bytes, end}}};
    layout.data_bytes = end;
  }
  try {
    layout.header = root.dump();
  } catch (const json::type_error& error) {
    throw UsageError(
        fmt::format("{}: a name or metadata text is not UTF-8: {}", path, printable(error.what())));
  }
  layout.header.resize((layout.header.size() + 7) / 8 * 8, ' ');
  SAFEGRAD_CHECK(layout.header.size() <= kMaxHeaderBytes, UsageError,
                 "{}: {} tensors need a header of {} bytes, the format allows {}", path,
                 entries.size(), layout.header.size(), kMaxHeaderBytes);
  return layout;
}

}  // namespace

struct SafetensorsWriter::State {
  std::string path;
  AtomicFile file;
  Sha256* hash;
  int64_t declared;
  int64_t appended = 0;

  void write(std::span<const std::byte> bytes) {
    if (hash) hash->update(bytes);
    file.write(bytes);
  }
};

SafetensorsWriter::SafetensorsWriter(std::string path, const std::vector<Entry>& entries,
                                     const std::map<std::string, std::string>& metadata,
                                     Sha256* hash) {
  const Layout layout = lay_out(path, entries, metadata);
  state_ = std::unique_ptr<State>(new State{path, AtomicFile(path), hash, layout.data_bytes});
  const uint64_t header_bytes = layout.header.size();
  state_->write(std::as_bytes(std::span(&header_bytes, 1)));
  state_->write(std::as_bytes(std::span(layout.header)));
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::append(std::span<const std::byte> bytes) {
  const auto n = static_cast<int64_t>(bytes.size());
  SAFEGRAD_CHECK(n <= state_->declared - state_->appended, UsageError,
                 "{}: {} bytes appended after {} of the {} declared", state_->path, n,
                 state_->appended, state_->declared);
  state_->write(bytes);
  state_->appended += n;
}

void SafetensorsWriter::sync() {
  state_->file.sync();
}

void SafetensorsWriter::finish() {
  SAFEGRAD_CHECK(state_->appended == state_->declared, UsageError,
                 "{}: finished with {} bytes of the {} declared", state_->path, state_->appended,
                 state_->declared);
  state_->file.commit();
}

}  // namespace safegrad
