#include "core/safetensors.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <system_error>
#include <tuple>
#include <utility>

#include <nlohmann/json.hpp>
#include <sys/mman.h>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"

namespace safegrad {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

constexpr uint64_t kLengthBytes = 8;
constexpr std::string_view kMetadataKey = "__metadata__";
constexpr std::string_view kDamaged = "the file is damaged or incomplete, fetch or write it again";

struct DtypeInfo {
  Dtype dtype;
  std::string_view name;
  int64_t bytes;
};
constexpr DtypeInfo kDtypes[] = {
    {Dtype::f64, "F64", 8},   {Dtype::f32, "F32", 4}, {Dtype::f16, "F16", 2},
    {Dtype::bf16, "BF16", 2}, {Dtype::i64, "I64", 8}, {Dtype::i32, "I32", 4},
    {Dtype::u8, "U8", 1},
};

const DtypeInfo& info_of(Dtype dtype) {
  return *std::find_if(std::begin(kDtypes), std::end(kDtypes),
                       [dtype](const DtypeInfo& info) { return info.dtype == dtype; });
}

/// A number of a header as int64; anything else is an InputError of `what`.
int64_t header_integer(const json& value, const std::string& what) {
  constexpr auto kLargest = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  // Non-negative JSON integers are always parsed as unsigned.
  SAFEGRAD_CHECK(value.is_number_unsigned() && value.get<uint64_t>() <= kLargest, InputError,
                 "{} must be whole numbers from 0 to 2^63-1; {}", what, kDamaged);
  return static_cast<int64_t>(value.get<uint64_t>());
}

struct Header {
  struct Tensor {
    std::string name;
    Dtype dtype;
    std::vector<int64_t> shape;
    int64_t begin, end;  // bytes from the start of the data
  };
  std::vector<Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

Header::Tensor parse_tensor(const std::string& path, const std::string& name, const json& entry) {
  const std::string where = fmt::format("{}: tensor \"{}\"", path, printable(name));
  const JsonObject object(entry, where);
  for (const auto& item : entry.items()) {
    const std::string& key = item.key();
    SAFEGRAD_CHECK(key == "dtype" || key == "shape" || key == "data_offsets", InputError,
                   "{}: unknown key \"{}\"; allowed: dtype, shape, data_offsets", where,
                   printable(key));
  }

  Header::Tensor tensor;
  tensor.name = name;
  const std::string dtype = object.string("dtype");
  const auto* const info = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                        [&](const DtypeInfo& i) { return i.name == dtype; });
  SAFEGRAD_CHECK(info != std::end(kDtypes), InputError,
                 "{}: dtype \"{}\" is not supported; allowed: F64, F32, F16, BF16, I64, I32, U8; "
                 "convert the file",
                 where, printable(dtype));
  tensor.dtype = info->dtype;

  const json* shape = object.find("shape");
  if (shape == nullptr || !shape->is_array()) object.refuse("shape", "a list of numbers");
  for (const json& n : *shape) tensor.shape.push_back(header_integer(n, where + ": shape entries"));
  const json* offsets = object.find("data_offsets");
  if (offsets == nullptr || !offsets->is_array() || offsets->size() != 2) {
    object.refuse("data_offsets", "a list of two numbers");
  }
  tensor.begin = header_integer((*offsets)[0], where + ": data_offsets");
  tensor.end = header_integer((*offsets)[1], where + ": data_offsets");

  const auto bytes = byte_count(tensor.dtype, tensor.shape);
  SAFEGRAD_CHECK(bytes, InputError, "{}: shape [{}] has more bytes than 2^63-1; {}", where,
                 fmt::join(tensor.shape, ", "), kDamaged);
  SAFEGRAD_CHECK(tensor.begin <= tensor.end && tensor.end - tensor.begin == *bytes, InputError,
                 "{}: shape [{}] of {} needs {} bytes, data_offsets [{}, {}] hold {}; {}", where,
                 fmt::join(tensor.shape, ", "), dtype, *bytes, tensor.begin, tensor.end,
                 tensor.end - tensor.begin, kDamaged);
  return tensor;
}

Header parse_header(const std::string& path, std::string_view text) {
  SAFEGRAD_CHECK(text.starts_with('{'), InputError,
                 "{}: the header does not begin with '{{'; is this a safetensors file?", path);
  const json root = parse_json(text, path);
  Header header;
  for (const auto& [name, entry] : root.items()) {
    if (name != kMetadataKey) {
      header.tensors.push_back(parse_tensor(path, name, entry));
      continue;
    }
    const JsonObject object(entry, path + ": __metadata__");
    for (const auto& [key, value] : entry.items()) {
      SAFEGRAD_CHECK(value.is_string(), InputError,
                     "{}: __metadata__ \"{}\" is a JSON {}, a string is expected", path,
                     printable(key), value.type_name());
      header.metadata[key] = value.get<std::string>();
    }
  }
  return header;
}

/// Tensors must tile the data exactly: sorted by offset, each begins where the last ended.
void check_layout(const std::string& path, std::vector<Header::Tensor>& tensors,
                  int64_t data_bytes) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& x, const auto& y) {
    return std::tie(x.begin, x.end) < std::tie(y.begin, y.end);
  });
  int64_t end = 0;
  for (const auto& tensor : tensors) {
    SAFEGRAD_CHECK(
        tensor.begin == end, InputError,
        "{}: tensor \"{}\" begins at data byte {}, the one before it ends at {} ({}); {}", path,
        printable(tensor.name), tensor.begin, end,
        tensor.begin < end ? "they overlap" : "there is a gap", kDamaged);
    SAFEGRAD_CHECK(tensor.end <= data_bytes, InputError,
                   "{}: tensor \"{}\" ends at data byte {}, the file has {} data bytes; {}", path,
                   printable(tensor.name), tensor.end, data_bytes, kDamaged);
    end = tensor.end;
  }
  SAFEGRAD_CHECK(end == data_bytes, InputError,
                 "{}: the tensors have {} data bytes, the file has {}; {}", path, end, data_bytes,
                 kDamaged);
}

uint32_t bits_of_half(uint16_t half) {
  // Each case is computed and one selected, so that the loop around this has no branch. Subnormals
  // are normalised by an exact subtraction that never forms a subnormal float: it also holds in
  // threads that flush those to zero.
  constexpr uint32_t kRebias = 112u << 23, kSubnormalBase = 113u << 23;
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t normal = magnitude + kRebias;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t subnormal = std::bit_cast<uint32_t>(
      std::bit_cast<float>(magnitude + kSubnormalBase) - std::bit_cast<float>(kSubnormalBase));
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  return ((half & 0x8000u) << 16) | (magnitude >= (31u << 23) ? special : finite);
}

template <class Convert>
void widen(const std::byte* in, int64_t n, float* out, Convert convert) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t word;
    std::memcpy(&word, in + 2 * i, 2);
    const uint32_t bits = convert(word);
    std::memcpy(out + i, &bits, 4);
  }
}

}  // namespace

int64_t size_of(Dtype dtype) {
  return info_of(dtype).bytes;
}

std::string name_of(Dtype dtype) {
  return std::string(info_of(dtype).name);
}

std::optional<int64_t> byte_count(Dtype dtype, const std::vector<int64_t>& shape) {
  int64_t bytes = size_of(dtype);
  for (const int64_t n : shape) {
    if (n < 0 || __builtin_mul_overflow(bytes, n, &bytes)) return std::nullopt;
  }
  return bytes;
}

int64_t TensorView::numel() const {
  return static_cast<int64_t>(bytes.size()) / size_of(dtype);
}

struct SafetensorsFile::Mapping {
  explicit Mapping(const std::string& file_path) : path(file_path) {
    const InputFile file(path);
    size = static_cast<uint64_t>(file.size());
    SAFEGRAD_CHECK(size > kLengthBytes, InputError,
                   "{}: has {} bytes, a safetensors file has at least 10; {}", path, size,
                   kDamaged);
    void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
    SAFEGRAD_CHECK(address != MAP_FAILED, InputError, "{}: cannot map {} bytes: {}", path, size,
                   std::generic_category().message(errno));
    data = static_cast<const std::byte*>(address);
  }
  ~Mapping() { ::munmap(const_cast<std::byte*>(data), size); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::string path;
  uint64_t size = 0;
  const std::byte* data = nullptr;
  std::map<std::string, TensorView> tensors;
  std::map<std::string, std::string> metadata;
};

SafetensorsFile::SafetensorsFile(const std::string& path)
    : mapping_(std::make_unique<Mapping>(path)) {
  Mapping& m = *mapping_;
  uint64_t header_bytes;
  std::memcpy(&header_bytes, m.data, kLengthBytes);
  SAFEGRAD_CHECK(
      header_bytes <= kMaxHeaderBytes, InputError,
      "{}: is no safetensors file: its first 8 bytes would be the length of a header, {}, and at "
      "most {} are allowed (tools/prepare.py makes token files)",
      path, header_bytes, kMaxHeaderBytes);
  SAFEGRAD_CHECK(header_bytes <= m.size - kLengthBytes, InputError,
                 "{}: claims a header of {} bytes, the file has {} after its first 8; {}", path,
                 header_bytes, m.size - kLengthBytes, kDamaged);

  Header header =
      parse_header(path, {reinterpret_cast<const char*>(m.data + kLengthBytes), header_bytes});
  const std::span data(m.data + kLengthBytes + header_bytes, m.size - kLengthBytes - header_bytes);
  check_layout(path, header.tensors, static_cast<int64_t>(data.size()));
  for (auto& tensor : header.tensors) {
    m.tensors[tensor.name] = {tensor.dtype, std::move(tensor.shape),
                              data.subspan(static_cast<size_t>(tensor.begin),
                                           static_cast<size_t>(tensor.end - tensor.begin))};
  }
  m.metadata = std::move(header.metadata);
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

const std::string& SafetensorsFile::path() const {
  return mapping_->path;
}

const std::map<std::string, TensorView>& SafetensorsFile::tensors() const {
  return mapping_->tensors;
}

const std::map<std::string, std::string>& SafetensorsFile::metadata() const {
  return mapping_->metadata;
}

bool SafetensorsFile::contains(const std::string& name) const {
  return tensors().contains(name);
}

const TensorView& SafetensorsFile::at(const std::string& name) const {
  const auto it = tensors().find(name);
  SAFEGRAD_CHECK(it != tensors().end(), InputError,
                 "{}: has no tensor \"{}\" among its {}; is this the right file?", path(),
                 printable(name), tensors().size());
  return it->second;
}

bool is_float(Dtype dtype) {
  return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16;
}

void read_as_float(const TensorView& tensor, int64_t begin, int64_t end, float* out) {
  SAFEGRAD_CHECK(0 <= begin && begin <= end && end <= tensor.numel(), UsageError,
                 "elements [{}, {}) read of a tensor with {}", begin, end, tensor.numel());
  const int64_t n = end - begin;
  if (n == 0) return;
  const std::byte* in = tensor.bytes.data() + begin * size_of(tensor.dtype);
  switch (tensor.dtype) {
    case Dtype::f32:
      std::memcpy(out, in, static_cast<size_t>(n) * 4);
      return;
    case Dtype::bf16:
      widen(in, n, out, [](uint16_t word) { return uint32_t{word} << 16; });
      return;
    case Dtype::f16:
      widen(in, n, out, bits_of_half);
      return;
    default:
      throw InputError(fmt::format("a tensor of {} is read as weights; allowed: F32, F16, BF16",
                                   name_of(tensor.dtype)));
  }
}

}  // namespace safegrad
