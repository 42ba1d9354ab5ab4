// Matrices transposed; see simd.h for how it is included.
#pragma once

#include "fastldm/simd.h"

namespace fastldm::FASTLDM_ISA {

#if defined(FASTLDM_AVX2) || defined(FASTLDM_AVX512)

constexpr int kSquare = 8;

// Writes factor · the transpose of `rows` rows of kSquare numbers; what follows those rows in each
// row of the result is overwritten, in ascending order.
FASTLDM_INLINE void transpose_square(const float* from, int64_t stride, int64_t rows, float factor,
                                     float* to, int64_t to_stride) {
  const __m256 by = _mm256_set1_ps(factor);
  __m256 row[kSquare], two[kSquare], four[kSquare];
#pragma GCC unroll 8
  for (int i = 0; i < kSquare; ++i) {
    row[i] = _mm256_mul_ps(_mm256_loadu_ps(from + (i < rows ? i : rows - 1) * stride), by);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSquare; i += 2) {
    two[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    two[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSquare; i += 4) {
    four[i] = _mm256_shuffle_ps(two[i], two[i + 2], 0x44);
    four[i + 1] = _mm256_shuffle_ps(two[i], two[i + 2], 0xEE);
    four[i + 2] = _mm256_shuffle_ps(two[i + 1], two[i + 3], 0x44);
    four[i + 3] = _mm256_shuffle_ps(two[i + 1], two[i + 3], 0xEE);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
  }
}

#else

constexpr int kSquare = 4;

FASTLDM_INLINE void transpose_square(const float* from, int64_t stride, int64_t rows, float factor,
                                     float* to, int64_t to_stride) {
  for (int j = 0; j < kSquare; ++j) {
    for (int i = 0; i < kSquare; ++i) {
      to[j * to_stride + i] = from[(i < rows ? i : rows - 1) * stride + j] * factor;
    }
  }
}

#endif

// factor · the transpose of [rows, columns].
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns,
                      float factor, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kSquare) {
    const bool is_whole = row + kSquare <= rows;
    int64_t column = 0;
    for (; is_whole && column + kSquare <= columns; column += kSquare) {
      transpose_square(from + row * stride + column, stride, kSquare, factor,
                       to + column * to_stride + row, to_stride);
    }
    const int64_t last = is_whole ? row + kSquare : rows;
    for (; column < columns; ++column) {
      for (int64_t i = row; i < last; ++i) {
        to[column * to_stride + i] = from[i * stride + column] * factor;
      }
    }
  }
}

// The transpose of [R, columns] with nothing between its rows; up to kSquare numbers that follow it
// are overwritten.
template <int R>
FASTLDM_INLINE void transpose_few(const float* from, int64_t stride, int64_t columns, float* to) {
  int64_t column = 0;
  for (; R <= kSquare && column + kSquare <= columns; column += kSquare) {
    transpose_square(from + column, stride, R, 1.0f, to + column * R, R);
  }
  for (; column < columns; ++column) {
    for (int i = 0; i < R; ++i) to[column * R + i] = from[i * stride + column];
  }
}

}  // namespace fastldm::FASTLDM_ISA
