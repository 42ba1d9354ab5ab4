// What each thread of the CUDA lookup does: plain functions, which the CPU can run, too.
//
// The search is that of code_screen.h, with online maxima instead of stored ones. Every thread
// keeps, for its latents, the largest score, the chunk of codes that has it, and the largest score
// of all other chunks. If the latter is below the margin, the nearest code is in that chunk, and
// only its codes are measured; if not, all codes are. So memory does not grow with N·K.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastldm/code_screen.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#define FASTLDM_DEVICE FASTLDM_HOST_DEVICE inline
#if defined(__CUDA_ARCH__)
#define FASTLDM_UNROLL _Pragma("unroll")
#else
#define FASTLDM_UNROLL
#endif

namespace fastldm::device {

constexpr float kInfinity = INFINITY;

struct alignas(16) Float4 {
  float value[4];
};

enum class Dtype : int { kFloat, kHalf, kBFloat16 };

// Latents that a thread reads at once: 16 bytes of 16-bit numbers.
constexpr int kRun = 8;

// How kRun latents, the first a multiple of kRun, lie in memory.
enum class Access : int {
  kScattered,
  kAlongLatents,   // in each channel one aligned run
  kAlongChannels,  // the channels of each latent one aligned run, latent after latent
};

// A tensor's latents, as in csrc/vector_quantize/positions.h.
struct Latents {
  static constexpr int kMaxDims = 8;

  const void* data;
  Dtype dtype;
  Access access;
  int dims;
  int64_t sizes[kMaxDims], strides[kMaxDims], channel_stride;

  FASTLDM_HOST_DEVICE int64_t offset(int64_t n) const {
    int64_t result = 0;
    for (int i = dims; i-- > 0;) {
      result += n % sizes[i] * strides[i];
      n /= sizes[i];
    }
    return result;
  }

  FASTLDM_HOST_DEVICE float load(int64_t at) const {
    if (dtype == Dtype::kFloat) return static_cast<const float*>(data)[at];
    return widen(static_cast<const uint16_t*>(data)[at]);
  }

  // kRun elements from an aligned place.
  FASTLDM_HOST_DEVICE void load_run(int64_t at, float* values) const {
    if (dtype == Dtype::kFloat) {
      const Float4* from = reinterpret_cast<const Float4*>(static_cast<const float*>(data) + at);
      const Float4 low = from[0], high = from[1];
      FASTLDM_UNROLL
      for (int i = 0; i < 4; ++i) {
        values[i] = low.value[i];
        values[4 + i] = high.value[i];
      }
    } else {
      struct alignas(16) Words {
        uint32_t value[4];
      };
      const Words words = *reinterpret_cast<const Words*>(static_cast<const uint16_t*>(data) + at);
      FASTLDM_UNROLL
      for (int i = 0; i < 4; ++i) {
        values[2 * i] = widen(static_cast<uint16_t>(words.value[i] & 0xffff));
        values[2 * i + 1] = widen(static_cast<uint16_t>(words.value[i] >> 16));
      }
    }
  }

 private:
  FASTLDM_HOST_DEVICE float widen(uint16_t bits) const {
    if (dtype == Dtype::kBFloat16) return from_bits(static_cast<uint32_t>(bits) << 16);
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float magnitude =
        rest < 0x400 ? static_cast<float>(rest) * 0x1p-24f : from_bits((rest << 13) + (112u << 23));
    return sign ? -magnitude : magnitude;
#endif
  }

  static FASTLDM_HOST_DEVICE float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
#endif
  }
};

// (a - b)^2 + sum, each operation rounded and none fused, as the specification has it.
FASTLDM_DEVICE float add_square(float a, float b, float sum) {
#if defined(__CUDA_ARCH__)
  const float difference = __fsub_rn(a, b);
  return __fadd_rn(sum, __fmul_rn(difference, difference));
#else
  const float difference = a - b;
  const float square = difference * difference;
  return sum + square;
#endif
}

// The largest score, its chunk, and the largest score of the other chunks.
struct TopTwo {
  float top = -kInfinity, second = -kInfinity;
  int32_t chunk = 0;

  FASTLDM_HOST_DEVICE void add(float score, int32_t of_chunk) {
    const bool larger = score > top;
    second = larger ? top : fmaxf(second, score);
    top = larger ? score : top;
    chunk = larger ? of_chunk : chunk;
  }

  FASTLDM_HOST_DEVICE void merge(const TopTwo& other) {
    add(other.top, other.chunk);
    second = fmaxf(second, other.second);
  }
};

// A code and its distance; of two as near the lower index is the nearer.
struct Nearest {
  float distance = kInfinity;
  int32_t index = 0;

  FASTLDM_HOST_DEVICE void add(float other_distance, int32_t other_index) {
    if (other_distance < distance || (other_distance == distance && other_index < index)) {
      distance = other_distance;
      index = other_index;
    }
  }
};

// Whether the nearest code must be in the chunk of the largest score.
FASTLDM_DEVICE bool is_decided(const TopTwo& scores, float latent_norm, float code_norm,
                               int64_t depth) {
  const float margin = screen_margin(depth, latent_norm, code_norm, scores.top);
  return is_bounded(latent_norm, code_norm, margin) && scores.second < scores.top - margin;
}

// What one code contributes to the bound on all of them.
struct CodeNorm {
  float norm = 0;
  bool has_nan = false;
};

// The bound itself, or infinity where there is none: a maximum would pass over NaN.
FASTLDM_DEVICE float code_norm_bound(float sum_of_squares, int64_t depth) {
  return sum_of_squares == sum_of_squares ? norm_bound(sum_of_squares, depth) : kInfinity;
}

// The codes of narrow latents, D <= kMaxNarrow, are stored four by four: D vectors of one element
// of four codes each, and one of their minus half squared norms.
constexpr int kMaxNarrow = 8;
constexpr int kNarrowChunk = 32;

// Lays out code k of padded many; those past the last score minus infinity.
FASTLDM_DEVICE CodeNorm lay_out_narrow(const float* codebook, int64_t num_codes, int64_t depth,
                                       const float* centre, int64_t k, float* codes) {
  float* to = codes + k / 4 * 4 * (depth + 1) + k % 4;
  const bool real = k < num_codes;
  CodeNorm found;
  float square = 0;
  for (int64_t d = 0; d < depth; ++d) {
    const float code = real ? codebook[k * depth + d] : centre[d];
    const float value = real ? code - centre[d] : 0.0f;
    found.has_nan |= real && code != code;
    square = fmaf(value, value, square);
    to[4 * d] = value;
  }
  to[4 * depth] = real ? -0.5f * square : -kInfinity;
  found.norm = code_norm_bound(square, depth);
  return found;
}

template <int D>
struct NarrowScreen {
  // Vectors of four of one chunk.
  static constexpr int kVectors = kNarrowChunk / 4 * (D + 1);

  float z[kRun][D];
  TopTwo scores[kRun];

  // Centred latents first … first + kRun - 1; those past the last repeat it.
  FASTLDM_HOST_DEVICE void begin(const Latents& latents, const float* centre, int64_t first,
                                 int64_t num_latents) {
    if (latents.access == Access::kAlongLatents && first + kRun <= num_latents) {
      const int64_t at = latents.offset(first);
      FASTLDM_UNROLL
      for (int d = 0; d < D; ++d) {
        float run[kRun];
        latents.load_run(at + d * latents.channel_stride, run);
        FASTLDM_UNROLL
        for (int q = 0; q < kRun; ++q) z[q][d] = run[q];
      }
    } else if (latents.access == Access::kAlongChannels && first + kRun <= num_latents) {
      const int64_t at = latents.offset(first);
      FASTLDM_UNROLL
      for (int i = 0; i < D; ++i) {
        float run[kRun];
        latents.load_run(at + i * kRun, run);
        FASTLDM_UNROLL
        for (int j = 0; j < kRun; ++j) z[(i * kRun + j) / D][(i * kRun + j) % D] = run[j];
      }
    } else {
      FASTLDM_UNROLL
      for (int q = 0; q < kRun; ++q) {
        const int64_t n = first + q < num_latents ? first + q : num_latents - 1;
        const int64_t at = latents.offset(n);
        FASTLDM_UNROLL
        for (int d = 0; d < D; ++d) z[q][d] = latents.load(at + d * latents.channel_stride);
      }
    }
    FASTLDM_UNROLL
    for (int d = 0; d < D; ++d) {
      const float middle = centre[d];
      FASTLDM_UNROLL
      for (int q = 0; q < kRun; ++q) z[q][d] -= middle;
    }
  }

  FASTLDM_HOST_DEVICE void add_chunk(const Float4* codes, int32_t chunk) {
    float most[kRun];
    FASTLDM_UNROLL
    for (int q = 0; q < kRun; ++q) most[q] = -kInfinity;
    for (int group = 0; group < kNarrowChunk / 4; ++group, codes += D + 1) {
      const Float4 start = codes[D];
      float score[kRun][4];
      FASTLDM_UNROLL
      for (int q = 0; q < kRun; ++q) FASTLDM_UNROLL
      for (int j = 0; j < 4; ++j) score[q][j] = start.value[j];
      FASTLDM_UNROLL
      for (int d = 0; d < D; ++d) {
        const Float4 code = codes[d];
        FASTLDM_UNROLL
        for (int q = 0; q < kRun; ++q) FASTLDM_UNROLL
        for (int j = 0; j < 4; ++j) score[q][j] = fmaf(z[q][d], code.value[j], score[q][j]);
      }
      FASTLDM_UNROLL
      for (int q = 0; q < kRun; ++q)
        most[q] =
            fmaxf(fmaxf(fmaxf(score[q][0], score[q][1]), fmaxf(score[q][2], score[q][3])), most[q]);
    }
    FASTLDM_UNROLL
    for (int q = 0; q < kRun; ++q) scores[q].add(most[q], chunk);
  }
};

// The codes of wide latents are stored transposed and centred, [padded depth, padded codes]. A
// block multiplies kWideTile latents by kWideTile codes, kWideStep channels at a time; each of its
// kWideThreads threads has 8 × 8 scores, for latents 4 y … 4 y + 3 and 64 + 4 y … 64 + 4 y + 3 and
// likewise for codes and x, where (x, y) is its place among 16 × 16.
constexpr int kWideTile = 128;
constexpr int kWideStep = 16;
constexpr int kWideThreads = 256;
constexpr int kWideChunk = 8;

// Place in a tile of the i-th of eight of thread coordinate x or y.
FASTLDM_DEVICE int wide_place(int x, int i) { return (i < 4 ? 0 : 64) + 4 * x + i % 4; }

FASTLDM_DEVICE int64_t wide_code(int32_t chunk, int i) {
  return static_cast<int64_t>(chunk / 16) * kWideTile + wide_place(chunk % 16, i);
}

FASTLDM_DEVICE int64_t narrow_code(int32_t chunk, int i) {
  return static_cast<int64_t>(chunk) * kNarrowChunk + i;
}

// Lays out one element of code k; returns the centred value.
FASTLDM_DEVICE float lay_out_wide(const float* codebook, int64_t num_codes, int64_t depth,
                                  int64_t padded_codes, const float* centre, int64_t k, int64_t d,
                                  float* codes, bool& has_nan) {
  float value = 0;
  if (k < num_codes && d < depth) {
    const float code = codebook[k * depth + d];
    has_nan |= code != code;
    value = code - centre[d];
  }
  codes[d * padded_codes + k] = value;
  return value;
}

struct WideScreen {
  // One step's part of the tile of latents, [channel][latent], or of codes, [channel][code].
  using Part = float[kWideStep][kWideTile];

  float product[8][8];
  TopTwo scores[8];
  float latents_run[kRun];
  Float4 codes_run[2];
  int64_t latent, place;  // the first latent that this thread reads, and where it is

  FASTLDM_HOST_DEVICE void begin(const Latents& latents, int64_t num_latents, int64_t first_latent,
                                 int thread) {
    const bool along_channels = latents.access == Access::kAlongChannels;
    latent = first_latent + (along_channels ? thread / 2 : thread % 16 * kRun);
    place = latent < num_latents ? latents.offset(latent) : 0;
  }

  // Reads this thread's share of a step into registers.
  FASTLDM_HOST_DEVICE void load(const Latents& latents, const float* centre, int64_t depth,
                                int64_t num_latents, const float* codes, int64_t padded_codes,
                                int64_t first_code, int64_t first_channel, int thread) {
    const bool along_channels = latents.access == Access::kAlongChannels;
    const int64_t n = latent;
    const int64_t d = first_channel + (along_channels ? thread % 2 * kRun : thread / 16);
    const bool whole = along_channels ? n < num_latents && d + kRun <= depth
                                      : n + kRun <= num_latents && d < depth;
    if (latents.access != Access::kScattered && whole) {
      latents.load_run(place + d * latents.channel_stride, latents_run);
      FASTLDM_UNROLL
      for (int i = 0; i < kRun; ++i) latents_run[i] -= centre[along_channels ? d + i : d];
    } else {
      // Unrolled, so that no run-time index keeps the run out of registers.
      FASTLDM_UNROLL
      for (int i = 0; i < kRun; ++i) {
        const int64_t d_i = along_channels ? d + i : d, n_i = along_channels ? n : n + i;
        latents_run[i] =
            d_i < depth && n_i < num_latents
                ? latents.load(latents.offset(n_i) + d_i * latents.channel_stride) - centre[d_i]
                : 0.0f;
      }
    }
    const Float4* from = reinterpret_cast<const Float4*>(
        codes + (first_channel + thread / 16) * padded_codes + first_code + thread % 16 * 8);
    codes_run[0] = from[0];
    codes_run[1] = from[1];
  }

  // Writes it to the parts that the block shares.
  FASTLDM_HOST_DEVICE void store(Access access, Part& latents, Part& codes, int thread) const {
    FASTLDM_UNROLL
    for (int i = 0; i < kRun; ++i) {
      if (access == Access::kAlongChannels) {
        latents[thread % 2 * kRun + i][thread / 2] = latents_run[i];
      } else {
        latents[thread / 16][thread % 16 * kRun + i] = latents_run[i];
      }
    }
    Float4* to = reinterpret_cast<Float4*>(&codes[thread / 16][thread % 16 * 8]);
    to[0] = codes_run[0];
    to[1] = codes_run[1];
  }

  FASTLDM_HOST_DEVICE void clear() {
    FASTLDM_UNROLL
    for (int i = 0; i < 8; ++i) FASTLDM_UNROLL
    for (int j = 0; j < 8; ++j) product[i][j] = 0.0f;
  }

  FASTLDM_HOST_DEVICE void multiply(const Part& latents, const Part& codes, int x, int y) {
    FASTLDM_UNROLL
    for (int k = 0; k < kWideStep; ++k) {
      Float4 a[2], b[2];
      FASTLDM_UNROLL
      for (int half = 0; half < 2; ++half) {
        a[half] = *reinterpret_cast<const Float4*>(&latents[k][64 * half + 4 * y]);
        b[half] = *reinterpret_cast<const Float4*>(&codes[k][64 * half + 4 * x]);
      }
      FASTLDM_UNROLL
      for (int i = 0; i < 8; ++i) FASTLDM_UNROLL
      for (int j = 0; j < 8; ++j)
        product[i][j] = fmaf(a[i / 4].value[i % 4], b[j / 4].value[j % 4], product[i][j]);
    }
  }

  // The largest score of latent i among this thread's codes.
  FASTLDM_HOST_DEVICE float most(int i, const float* minus_half_square, int64_t first_code,
                                 int x) const {
    float result = -kInfinity;
    FASTLDM_UNROLL
    for (int j = 0; j < 8; ++j)
      result = fmaxf(result, product[i][j] + minus_half_square[first_code + wide_place(x, j)]);
    return result;
  }
};

// What is left to do for a latent when all scores are known.
struct Finish {
  Latents latents;
  const float* codebook;  // [num_codes, depth]
  const float* centre;
  int64_t num_codes, depth;
  bool narrow;

  FASTLDM_HOST_DEVICE float norm(int64_t place) const {
    float sum = 0;
    for (int64_t d = 0; d < depth; ++d) {
      const float value = latents.load(place + d * latents.channel_stride) - centre[d];
      sum = fmaf(value, value, sum);
    }
    return norm_bound(sum, depth);
  }

  FASTLDM_HOST_DEVICE float distance(int64_t place, int64_t k) const {
    float sum = 0;
    for (int64_t d = 0; d < depth; ++d)
      sum = add_square(latents.load(place + d * latents.channel_stride), codebook[k * depth + d],
                       sum);
    return sum;
  }

  FASTLDM_HOST_DEVICE Nearest of_chunk(int64_t place, int32_t chunk) const {
    Nearest nearest;
    for (int i = 0; i < (narrow ? kNarrowChunk : kWideChunk); ++i) {
      const int64_t k = narrow ? narrow_code(chunk, i) : wide_code(chunk, i);
      if (k < num_codes) nearest.add(distance(place, k), static_cast<int32_t>(k));
    }
    return nearest;
  }

  // Of every `step`-th code from `first` on.
  FASTLDM_HOST_DEVICE Nearest of_all(int64_t place, int64_t first, int64_t step) const {
    Nearest nearest;
    for (int64_t k = first; k < num_codes; k += step)
      nearest.add(distance(place, k), static_cast<int32_t>(k));
    return nearest;
  }
};

}  // namespace fastldm::device
