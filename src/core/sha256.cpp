#include "core/sha256.h"

#include <array>
#include <memory>
#include <vector>

#include <openssl/evp.h>

#include "core/error.h"
#include "core/files.h"

namespace safegrad {

std::string sha256_of_file(const std::string& path) {
  InputFile file(path);
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(),
                                                                        &EVP_MD_CTX_free);
  SAFEGRAD_CHECK(context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1, RunError,
                 "OpenSSL offers no SHA-256; check its installation");

  std::vector<std::byte> buffer(size_t{1} << 20);
  while (const size_t n = file.read(buffer)) {
    SAFEGRAD_CHECK(EVP_DigestUpdate(context.get(), buffer.data(), n) == 1, RunError,
                   "{}: OpenSSL failed to hash it", path);
  }

  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int length = 0;
  SAFEGRAD_CHECK(EVP_DigestFinal_ex(context.get(), digest.data(), &length) == 1, RunError,
                 "{}: OpenSSL failed to hash it", path);
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) hex += fmt::format("{:02x}", digest[i]);
  return hex;
}

}  // namespace safegrad
