// fuzz_safetensors.cpp: any bytes as a safetensors file: of what is taken, every byte can be read.
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "fuzz/fuzz_input.h"

namespace safegrad::fuzz {
namespace {

void read_everything(const SafetensorsFile& file, size_t file_bytes) {
  size_t data_bytes = 0;
  for (const auto& [name, tensor] : file.tensors()) {
    require(file.contains(name) && &file.at(name) == &tensor, "a tensor is found by its name");
    const auto expected = byte_count(tensor.dtype, tensor.shape);
    require(expected && static_cast<size_t>(*expected) == tensor.bytes.size(),
            "a tensor has the bytes of its shape");
    data_bytes += tensor.bytes.size();
    // Address sanitizer does not know the mapping's bounds; reading past it is a fault all the
    // same.
    volatile uint8_t sum = 0;
    for (const std::byte b : tensor.bytes) sum = sum + static_cast<uint8_t>(b);
    if (!is_float(tensor.dtype)) continue;
    const int64_t n = tensor.numel();
    std::vector<float> all(static_cast<size_t>(n));
    read_as_float(tensor, 0, n, all.data());
    std::vector<float> rest(static_cast<size_t>(n - n / 3));
    read_as_float(tensor, n / 3, n, rest.data());
  }
  require(data_bytes + 8 < file_bytes, "tensors do not overlap");
}

}  // namespace
}  // namespace safegrad::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace safegrad;
  const std::string bytes = fuzz::as_safetensors(fuzz::as_text(data, size));
  const fuzz::MemoryFile input(bytes);
  fuzz::takes([&] { fuzz::read_everything(SafetensorsFile(input.path()), bytes.size()); });
  return 0;
}
