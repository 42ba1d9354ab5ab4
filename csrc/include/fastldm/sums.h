// Sums in one order on every instruction set, which is that of the lanes of 64-byte vectors.
#pragma once

#include <cstdint>

#include "fastldm/inline.h"

namespace fastldm {

template <typename T>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(T);
  typedef T Vector __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));

  static FASTLDM_INLINE Vector load(const T* values) {
    return *reinterpret_cast<const Vector*>(values);
  }

  // The halves added, and the halves of the sum, down to one number.
  static FASTLDM_INLINE T sum(Vector v) {
    const Quarter quarter = folded<Quarter>(folded<Half>(v));
    if constexpr (kCount == 16) {
      return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
    } else {
      return quarter[0] + quarter[1];
    }
  }

 private:
  typedef T Half __attribute__((vector_size(32)));
  typedef T Quarter __attribute__((vector_size(16)));

  template <typename Folded, typename Whole>
  static FASTLDM_INLINE Folded folded(Whole v) {
    Folded low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return low + high;
  }
};

template <typename T>
FASTLDM_INLINE T sum(const T* values, int64_t count) {
  constexpr int kLanes = Lanes<T>::kCount;
  typename Lanes<T>::Vector s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    s0 += Lanes<T>::load(values + i);
    s1 += Lanes<T>::load(values + i + kLanes);
    s2 += Lanes<T>::load(values + i + 2 * kLanes);
    s3 += Lanes<T>::load(values + i + 3 * kLanes);
  }
  for (; i + kLanes <= count; i += kLanes) s0 += Lanes<T>::load(values + i);
  T rest = 0;
  for (; i < count; ++i) rest += values[i];
  return Lanes<T>::sum((s0 + s1) + (s2 + s3)) + rest;
}

// The sums of v - centre and of its square.
template <typename T>
FASTLDM_INLINE void sum_deviations(const T* values, int64_t count, T centre, T& sum, T& squares) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  Vector s0 = {}, s1 = {}, q0 = {}, q1 = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Vector d0 = Lanes<T>::load(values + i) - centre;
    const Vector d1 = Lanes<T>::load(values + i + kLanes) - centre;
    s0 += d0;
    s1 += d1;
    q0 += d0 * d0;
    q1 += d1 * d1;
  }
  for (; i + kLanes <= count; i += kLanes) {
    const Vector d = Lanes<T>::load(values + i) - centre;
    s0 += d;
    q0 += d * d;
  }
  T rest = 0, rest_of_squares = 0;
  for (; i < count; ++i) {
    const T d = values[i] - centre;
    rest += d;
    rest_of_squares += d * d;
  }
  sum = rest;
  squares = rest_of_squares;
  if (count < kLanes) return;
  sum += Lanes<T>::sum(s0 + s1);
  squares += Lanes<T>::sum(q0 + q1);
}

// The sums of g and of g (v - centre).
template <typename T>
FASTLDM_INLINE void sum_weighted(const T* g, const T* values, int64_t count, T centre, T& sum,
                                 T& products) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  Vector s0 = {}, s1 = {}, q0 = {}, q1 = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Vector g0 = Lanes<T>::load(g + i), g1 = Lanes<T>::load(g + i + kLanes);
    s0 += g0;
    s1 += g1;
    q0 += g0 * (Lanes<T>::load(values + i) - centre);
    q1 += g1 * (Lanes<T>::load(values + i + kLanes) - centre);
  }
  for (; i + kLanes <= count; i += kLanes) {
    const Vector g0 = Lanes<T>::load(g + i);
    s0 += g0;
    q0 += g0 * (Lanes<T>::load(values + i) - centre);
  }
  T rest = 0, rest_of_products = 0;
  for (; i < count; ++i) {
    rest += g[i];
    rest_of_products += g[i] * (values[i] - centre);
  }
  sum = rest;
  products = rest_of_products;
  if (count < kLanes) return;
  sum += Lanes<T>::sum(s0 + s1);
  products += Lanes<T>::sum(q0 + q1);
}

// The same for each column of [rows, width], added to what is there; four rows at a time, so that
// the sums are read and written once in four rows.
template <typename T>
FASTLDM_INLINE void add_columns(const T* __restrict__ values, int64_t rows, int64_t width,
                                T* __restrict__ sums) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, values += 4 * width) {
    for (int64_t c = 0; c < width; ++c) {
      sums[c] += (values[c] + values[width + c]) + (values[2 * width + c] + values[3 * width + c]);
    }
  }
  for (; row < rows; ++row, values += width) {
    for (int64_t c = 0; c < width; ++c) sums[c] += values[c];
  }
}

template <typename T>
FASTLDM_INLINE void add_column_deviations(const T* __restrict__ values, int64_t rows, int64_t width,
                                          const T* __restrict__ centres, T* __restrict__ sums,
                                          T* __restrict__ squares) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, values += 4 * width) {
    for (int64_t c = 0; c < width; ++c) {
      const T d0 = values[c] - centres[c], d1 = values[width + c] - centres[c];
      const T d2 = values[2 * width + c] - centres[c], d3 = values[3 * width + c] - centres[c];
      sums[c] += (d0 + d1) + (d2 + d3);
      squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; row < rows; ++row, values += width) {
    for (int64_t c = 0; c < width; ++c) {
      const T d = values[c] - centres[c];
      sums[c] += d;
      squares[c] += d * d;
    }
  }
}

template <typename T>
FASTLDM_INLINE void add_weighted_columns(const T* __restrict__ g, const T* __restrict__ values,
                                         int64_t rows, int64_t width, const T* __restrict__ centres,
                                         T* __restrict__ sums, T* __restrict__ products) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, g += 4 * width, values += 4 * width) {
    for (int64_t c = 0; c < width; ++c) {
      const T g0 = g[c], g1 = g[width + c], g2 = g[2 * width + c], g3 = g[3 * width + c];
      sums[c] += (g0 + g1) + (g2 + g3);
      products[c] +=
          (g0 * (values[c] - centres[c]) + g1 * (values[width + c] - centres[c])) +
          (g2 * (values[2 * width + c] - centres[c]) + g3 * (values[3 * width + c] - centres[c]));
    }
  }
  for (; row < rows; ++row, g += width, values += width) {
    for (int64_t c = 0; c < width; ++c) {
      sums[c] += g[c];
      products[c] += g[c] * (values[c] - centres[c]);
    }
  }
}

// Mean and sum of squared deviations of a set, and those of the union of two sets
// (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979).
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // A set of `count` numbers from the sums about a centre that is near their mean.
  static FASTLDM_INLINE Moments about(double centre, double count, double sum, double squares) {
    const double shift = sum / count, spread = squares - sum * shift;
    // Not std::max, which would turn NaN into 0.
    return {count, centre + shift, spread < 0 ? 0 : spread};
  }

  FASTLDM_INLINE void add(const Moments& other) {
    const double total = count + other.count, distance = other.mean - mean;
    mean += distance * (other.count / total);
    squares += other.squares + distance * distance * (count * other.count / total);
    count = total;
  }
};

}  // namespace fastldm
