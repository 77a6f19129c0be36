#include "core/sha256.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include <openssl/evp.h>

#include "core/error.h"
#include "core/files.h"

namespace safegrad {

struct Sha256::State {
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context{EVP_MD_CTX_new(),
                                                                  &EVP_MD_CTX_free};
};

Sha256::Sha256() : state_(std::make_unique<State>()) {
  EVP_MD_CTX* const context = state_->context.get();
  SAFEGRAD_CHECK(context && EVP_DigestInit_ex(context, EVP_sha256(), nullptr) == 1, RunError,
                 "OpenSSL offers no SHA-256; check its installation");
}

Sha256::~Sha256() = default;

void Sha256::update(std::span<const std::byte> bytes) {
  SAFEGRAD_CHECK(EVP_DigestUpdate(state_->context.get(), bytes.data(), bytes.size()) == 1, RunError,
                 "OpenSSL failed to hash {} bytes", bytes.size());
  bytes_ += static_cast<int64_t>(bytes.size());
}

std::string Sha256::hex() {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int length = 0;
  SAFEGRAD_CHECK(EVP_DigestFinal_ex(state_->context.get(), digest.data(), &length) == 1, RunError,
                 "OpenSSL failed to finish a hash");
  std::string text;
  for (unsigned int i = 0; i < length; ++i) text += fmt::format("{:02x}", digest[i]);
  return text;
}

std::string sha256_of(std::span<const std::byte> bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.hex();
}

std::string sha256_of_file(const std::string& path) {
  InputFile file(path);
  Sha256 hash;
  std::vector<std::byte> buffer(
      static_cast<size_t>(std::clamp(file.size(), int64_t{1}, int64_t{1} << 20)));
  while (const size_t n = file.read(buffer)) hash.update(std::span(buffer).first(n));
  return hash.hex();
}

}  // namespace safegrad
