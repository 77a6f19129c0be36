// safetensors.h: maps safetensors files and reads ranges of their tensors; nothing in a file is
// trusted.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace safegrad {

class Sha256;

enum class Dtype { f64, f32, f16, bf16, i64, i32, u8 };

/// Bytes of one element.
int64_t size_of(Dtype dtype);
/// "F32", "BF16", ... as spelled in the file format.
std::string name_of(Dtype dtype);
/// size_of(dtype) * prod(shape); nothing if a dimension is negative or the product leaves int64.
std::optional<int64_t> byte_count(Dtype dtype, const std::vector<int64_t>& shape);

/// Longest JSON header that is read or written: the reference implementation's limit.
inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;

/// One tensor of a mapped file. `bytes` lies inside the mapping and has size_of(dtype) *
/// prod(shape) bytes.
struct TensorView {
  Dtype dtype;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
  int64_t numel() const;
};

/// A read-only memory-mapped safetensors file (format: 8-byte little-endian header length, JSON
/// header, data). The constructor checks header length (at most 100 MB), JSON, dtypes, shapes,
/// offsets (inside the data, no overlap, no gap) and file size; it throws InputError naming the
/// file, the tensor and both values. Data is not aligned: read it with memcpy or read_as_float. The
/// file must not be shortened or rewritten in place while it is mapped; writers here rename.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  const std::string& path() const;
  const std::map<std::string, TensorView>& tensors() const;
  /// The header's "__metadata__" (strings), empty if absent.
  const std::map<std::string, std::string>& metadata() const;
  bool contains(const std::string& name) const;
  /// Throws InputError (file and the name) if there is no such tensor.
  const TensorView& at(const std::string& name) const;

 private:
  struct Mapping;
  std::unique_ptr<Mapping> mapping_;
};

/// f32, f16, bf16: what read_as_float takes.
bool is_float(Dtype dtype);

/// out[0 .. end-begin) <- elements [begin, end) of the flattened tensor, converted to float.
/// Exact. InputError for a dtype that is not is_float(); UsageError if the range is outside.
void read_as_float(const TensorView& tensor, int64_t begin, int64_t end, float* out);

/// Writes a safetensors file piece by piece: declare everything, then append data in the declared
/// order. Tensors lie in declared order. Data goes to `path` + ".tmp"; finish() fsyncs and renames
/// it, so `path` is whole or untouched. Throws RunError (path, errno text) when the disk refuses.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    Dtype dtype;
    std::vector<int64_t> shape;
  };
  /// Writes the header. `hash`, which outlives this object, is told all bytes of the file as they
  /// are meant to be. UsageError: a name twice or "__metadata__", text that is not UTF-8, a
  /// negative or overflowing shape, a header above 100 MB.
  SafetensorsWriter(std::string path, const std::vector<Entry>& entries,
                    const std::map<std::string, std::string>& metadata, Sha256* hash = nullptr);
  ~SafetensorsWriter();  // without finish(): removes the temporary file
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// Next bytes of the data section. UsageError if more is appended than was declared.
  void append(std::span<const std::byte> bytes);
  /// Waits until what was appended is on the disk: what is left for finish() is then short.
  void sync();
  /// UsageError if less was appended than was declared.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace safegrad
