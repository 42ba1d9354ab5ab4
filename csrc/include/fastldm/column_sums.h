// Sums over the rows of [rows, width], one a column, added to what is there.
//
// Columns are walked in strips whose sums stay in registers. Four rows are added to each other
// before they are added to a sum, which rounds less.
#pragma once

#include <cstdint>

#include "fastldm/inline.h"

namespace fastldm {

// One number, or as many neighbours as a vector V has.
template <typename V, typename T>
FASTLDM_INLINE V load_as(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// What is summed: so many terms of the element with the index `element` in [rows, width].
template <typename T>
struct ColumnValues {
  static constexpr int kTerms = 1;
  const T* values;

  template <typename V>
  FASTLDM_INLINE void at(int64_t element, int64_t, V (&terms)[1]) const {
    terms[0] = load_as<V>(values + element);
  }
};

// How far elements are from their column's centre.
template <typename T>
struct FromCentres {
  const T *values, *centres;

  template <typename V>
  FASTLDM_INLINE V at(int64_t element, int64_t column) const {
    return load_as<V>(values + element) - load_as<V>(centres + column);
  }
};

template <typename T>
struct ColumnDistances {
  static constexpr int kTerms = 1;
  FromCentres<T> distances;

  template <typename V>
  FASTLDM_INLINE void at(int64_t element, int64_t column, V (&terms)[1]) const {
    terms[0] = distances.template at<V>(element, column);
  }
};

// The distance and its square.
template <typename T>
struct ColumnDeviations {
  static constexpr int kTerms = 2;
  FromCentres<T> distances;

  template <typename V>
  FASTLDM_INLINE void at(int64_t element, int64_t column, V (&terms)[2]) const {
    terms[0] = distances.template at<V>(element, column);
    terms[1] = terms[0] * terms[0];
  }
};

// A weight g and its product with the distance.
template <typename T>
struct WeightedColumns {
  static constexpr int kTerms = 2;
  const T* g;
  FromCentres<T> distances;

  template <typename V>
  FASTLDM_INLINE void at(int64_t element, int64_t column, V (&terms)[2]) const {
    terms[0] = load_as<V>(g + element);
    terms[1] = terms[0] * distances.template at<V>(element, column);
  }
};

// The columns of kVectors vectors V.
template <typename V, int kVectors, typename Terms, typename T>
FASTLDM_INLINE void add_strip(const Terms& of, int64_t rows, int64_t width, int64_t column,
                              T* const (&to)[Terms::kTerms]) {
  constexpr int kTerms = Terms::kTerms, kEach = sizeof(V) / sizeof(T);
  V sums[kVectors][kTerms];
  for (int v = 0; v < kVectors; ++v) {
    for (int t = 0; t < kTerms; ++t) {
      sums[v][t] = load_as<V>(to[t] + column + v * kEach);
    }
  }
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    for (int v = 0; v < kVectors; ++v) {
      V terms[4][kTerms];
      for (int r = 0; r < 4; ++r) {
        of.at((row + r) * width + column + v * kEach, column + v * kEach, terms[r]);
      }
      for (int t = 0; t < kTerms; ++t) {
        sums[v][t] += (terms[0][t] + terms[1][t]) + (terms[2][t] + terms[3][t]);
      }
    }
  }
  for (; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      V terms[kTerms];
      of.at(row * width + column + v * kEach, column + v * kEach, terms);
      for (int t = 0; t < kTerms; ++t) sums[v][t] += terms[t];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int t = 0; t < kTerms; ++t) {
      __builtin_memcpy(to[t] + column + v * kEach, &sums[v][t], sizeof(V));
    }
  }
}

// As many such strips as there are columns for. Gives the first column that is left.
template <typename V, int kVectors, typename Terms, typename T>
FASTLDM_INLINE int64_t add_strips(const Terms& of, int64_t rows, int64_t width, int64_t column,
                                  T* const (&to)[Terms::kTerms]) {
  constexpr int64_t kColumns = kVectors * sizeof(V) / sizeof(T);
  for (; column + kColumns <= width; column += kColumns) {
    add_strip<V, kVectors>(of, rows, width, column, to);
  }
  return column;
}

// `to` are the sums of each term, [width].
template <typename Processor, typename Terms, typename T>
FASTLDM_INLINE void add_columns(const Terms& of, int64_t rows, int64_t width,
                                T* const (&to)[Terms::kTerms]) {
  typedef T Register __attribute__((vector_size(Processor::kRegisterBytes)));
  typedef T Half __attribute__((vector_size(32)));
  typedef T Quarter __attribute__((vector_size(16)));
  int64_t column = add_strips<Register, 4>(of, rows, width, 0, to);
  column = add_strips<Register, 1>(of, rows, width, column, to);
  if constexpr (sizeof(Register) > sizeof(Half)) {
    column = add_strips<Half, 1>(of, rows, width, column, to);
  }
  if constexpr (sizeof(Register) > sizeof(Quarter)) {
    column = add_strips<Quarter, 1>(of, rows, width, column, to);
  }
  add_strips<T, 1>(of, rows, width, column, to);
}

}  // namespace fastldm
