// random.h: counter-based random numbers (Philox4x32-10), so that no draw depends on layout or call
// order.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SAFEGRAD_HOST_DEVICE __host__ __device__
#else
#define SAFEGRAD_HOST_DEVICE
#endif

namespace safegrad {

/// Four random words; std::array's operators are not for device code.
struct RandomBits {
  uint32_t words[4];
  SAFEGRAD_HOST_DEVICE uint32_t operator[](int i) const { return words[i]; }
  bool operator==(const RandomBits&) const = default;
};

/// Philox4x32-10 (Salmon et al., SC 2011): 128 random bits for (key, counter). Pure; the same on
/// CPU and GPU.
struct Philox {
  uint32_t key0, key1;

  SAFEGRAD_HOST_DEVICE explicit Philox(uint64_t key)
      : key0(static_cast<uint32_t>(key)), key1(static_cast<uint32_t>(key >> 32)) {}

  SAFEGRAD_HOST_DEVICE RandomBits operator()(uint64_t low, uint64_t high) const {
    uint32_t c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32);
    uint32_t c2 = static_cast<uint32_t>(high), c3 = static_cast<uint32_t>(high >> 32);
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      c0 = n0;
      c2 = n2;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }
};

/// Mixes a word into a hash (SplitMix64 finaliser): for keys made of several parts and for
/// fingerprints.
SAFEGRAD_HOST_DEVICE inline uint64_t mix64(uint64_t h, uint64_t word) {
  uint64_t x = h ^ (word + 0x9E3779B97F4A7C15ull + (h << 6) + (h >> 2));
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// Uniform float in [0, 1) with 24 random bits.
SAFEGRAD_HOST_DEVICE inline float uniform01(uint32_t bits) {
  return static_cast<float>(bits >> 8) * 0x1.0p-24f;
}

}  // namespace safegrad
