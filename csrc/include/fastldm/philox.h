// Normal numbers from a seed and an offset, bit for bit those of philox_normal in
// fastldm/ops/diffusion_step/reference.py, where the definition stands.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "fastldm/arithmetic.h"
#include "fastldm/inline.h"

namespace fastldm {

// Philox 4x32-10 (Salmon et al., SC 2011) of the blocks `first` to `first + count - 1`; word w of
// block i goes to words[w][i].
template <int kCapacity>
FASTLDM_INLINE void philox_words(uint64_t seed, uint64_t offset, uint64_t first, int count,
                                 uint32_t (&words)[4][kCapacity]) {
  const uint32_t offset_low = static_cast<uint32_t>(offset);
  const uint32_t offset_high = static_cast<uint32_t>(offset >> 32);
  const uint32_t seed_low = static_cast<uint32_t>(seed),
                 seed_high = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < count; ++i) {
    const uint64_t block = first + static_cast<uint64_t>(i);
    uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
    uint32_t c2 = offset_low, c3 = offset_high, k0 = seed_low, k1 = seed_high;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
}

// artanh(s)/s at z = s^2, cos(t) and sin(t)/t at z = t^2.
constexpr float kArtanh[] = {1.0f, 1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9};
constexpr float kCosine[] = {1.0f,        -1.0f / 2,    1.0f / 24,
                             -1.0f / 720, 1.0f / 40320, -1.0f / 3628800};
constexpr float kSine[] = {1.0f,         -1.0f / 6,     1.0f / 120,
                           -1.0f / 5040, 1.0f / 362880, -1.0f / 39916800};

// ln u of a normal number u > 0, as e ln 2 + 2 artanh((m - 1)/(m + 1)) with sqrt(1/2) <= m <
// sqrt(2).
FASTLDM_INLINE float natural_logarithm(float u) {
  const int32_t bits = std::bit_cast<int32_t>(u);
  const int32_t exponent = (bits - std::bit_cast<int32_t>(0.70710678f)) >> 23;
  const float m = std::bit_cast<float>(bits - exponent * (1 << 23));
  const float s = (m - 1.0f) / (m + 1.0f);
  return static_cast<float>(exponent) * 0.693147181f + 2.0f * s * polynomial<false>(kArtanh, s * s);
}

// The two normals of a pair of words.
FASTLDM_INLINE void box_muller(uint32_t a, uint32_t b, float& along, float& across) {
  const float u = (static_cast<float>(static_cast<int32_t>(a >> 1)) + 1.0f) * 0x1p-31f;
  const float radius = std::sqrt(-2.0f * natural_logarithm(u));
  const int32_t position = static_cast<int32_t>(b >> 8);
  const int32_t quarter = (position + (1 << 21)) >> 22;
  const float t = static_cast<float>(position - (quarter << 22)) * (6.283185307f * 0x1p-24f);
  const float z = t * t, cosine = polynomial<false>(kCosine, z),
              sine = t * polynomial<false>(kSine, z);
  const float x = quarter & 1 ? sine : cosine, y = quarter & 1 ? cosine : sine;
  along = radius * ((quarter + 1) & 2 ? -x : x);
  across = radius * (quarter & 2 ? -y : y);
}

constexpr int kNormalsPerCall = 512;

// Elements `first` to `first + count - 1`, at most kNormalsPerCall of them.
template <typename T>
FASTLDM_INLINE void normals(uint64_t seed, uint64_t offset, int64_t first, int count, T* out) {
  constexpr int kBlocks = kNormalsPerCall / 4 + 1;
  uint32_t words[4][kBlocks];
  float lanes[4][kBlocks];
  const int skip = static_cast<int>(first % 4), blocks = (skip + count + 3) / 4;
  philox_words(seed, offset, static_cast<uint64_t>(first / 4), blocks, words);
  for (int pair = 0; pair < 4; pair += 2) {
    for (int i = 0; i < blocks; ++i) {
      box_muller(words[pair][i], words[pair + 1][i], lanes[pair][i], lanes[pair + 1][i]);
    }
  }
  for (int i = 0; i < count; ++i) out[i] = static_cast<T>(lanes[(skip + i) % 4][(skip + i) / 4]);
}

}  // namespace fastldm
