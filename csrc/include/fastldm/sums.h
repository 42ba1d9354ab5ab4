// Sums in one order on every instruction set, which is that of the lanes of 64-byte vectors.
#pragma once

#include <cstdint>

#include "fastldm/inline.h"

namespace fastldm {

// Sixteen floats, or eight doubles, in as many registers as they fill.
template <typename Processor, typename T>
struct Lanes {
  static constexpr int kBytes = Processor::kRegisterBytes, kParts = 64 / kBytes;
  static constexpr int kEach = kBytes / sizeof(T), kCount = 64 / sizeof(T);
  typedef T Vector __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));

  Vector part[kParts] = {};

  static FASTLDM_INLINE Lanes load(const T* values) {
    Lanes lanes;
    for (int i = 0; i < kParts; ++i) {
      lanes.part[i] = *reinterpret_cast<const Vector*>(values + i * kEach);
    }
    return lanes;
  }

  FASTLDM_INLINE Lanes minus(T value) const {
    Lanes lanes;
    for (int i = 0; i < kParts; ++i) lanes.part[i] = part[i] - value;
    return lanes;
  }

  FASTLDM_INLINE void add(const Lanes& other) {
    for (int i = 0; i < kParts; ++i) part[i] += other.part[i];
  }

  FASTLDM_INLINE void add_product(const Lanes& a, const Lanes& b) {
    for (int i = 0; i < kParts; ++i) part[i] += a.part[i] * b.part[i];
  }

  // The halves added, and the halves of the sum, down to one number.
  FASTLDM_INLINE T sum() const {
    Quarter quarter;
    if constexpr (kParts == 1) {
      quarter = folded<Quarter>(folded<Half>(part[0]));
    } else if constexpr (kParts == 2) {
      quarter = folded<Quarter>(part[0] + part[1]);
    } else {
      quarter = (part[0] + part[2]) + (part[1] + part[3]);
    }
    if constexpr (sizeof(T) == 4) {
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

template <typename Processor, typename T>
FASTLDM_INLINE T sum(const T* values, int64_t count) {
  using L = Lanes<Processor, T>;
  L s0, s1, s2, s3;
  int64_t i = 0;
  for (; i + 4 * L::kCount <= count; i += 4 * L::kCount) {
    s0.add(L::load(values + i));
    s1.add(L::load(values + i + L::kCount));
    s2.add(L::load(values + i + 2 * L::kCount));
    s3.add(L::load(values + i + 3 * L::kCount));
  }
  for (; i + L::kCount <= count; i += L::kCount) s0.add(L::load(values + i));
  T rest = 0;
  for (; i < count; ++i) rest += values[i];
  s0.add(s1);
  s2.add(s3);
  s0.add(s2);
  return s0.sum() + rest;
}

// The sums of v - centre and of its square.
template <typename Processor, typename T>
FASTLDM_INLINE void sum_deviations(const T* values, int64_t count, T centre, T& sum, T& squares) {
  using L = Lanes<Processor, T>;
  L s0, s1, q0, q1;
  int64_t i = 0;
  for (; i + 2 * L::kCount <= count; i += 2 * L::kCount) {
    const L d0 = L::load(values + i).minus(centre);
    const L d1 = L::load(values + i + L::kCount).minus(centre);
    s0.add(d0);
    s1.add(d1);
    q0.add_product(d0, d0);
    q1.add_product(d1, d1);
  }
  if (i + L::kCount <= count) {
    const L d = L::load(values + i).minus(centre);
    s0.add(d);
    q0.add_product(d, d);
    i += L::kCount;
  }
  sum = 0;
  squares = 0;
  for (; i < count; ++i) {
    const T d = values[i] - centre;
    sum += d;
    squares += d * d;
  }
  if (count < L::kCount) return;
  s0.add(s1);
  q0.add(q1);
  sum += s0.sum();
  squares += q0.sum();
}

// The sums of g and of g (v - centre).
template <typename Processor, typename T>
FASTLDM_INLINE void sum_weighted(const T* g, const T* values, int64_t count, T centre, T& sum,
                                 T& products) {
  using L = Lanes<Processor, T>;
  L s0, s1, q0, q1;
  int64_t i = 0;
  for (; i + 2 * L::kCount <= count; i += 2 * L::kCount) {
    const L g0 = L::load(g + i), g1 = L::load(g + i + L::kCount);
    s0.add(g0);
    s1.add(g1);
    q0.add_product(g0, L::load(values + i).minus(centre));
    q1.add_product(g1, L::load(values + i + L::kCount).minus(centre));
  }
  if (i + L::kCount <= count) {
    const L g0 = L::load(g + i);
    s0.add(g0);
    q0.add_product(g0, L::load(values + i).minus(centre));
    i += L::kCount;
  }
  sum = 0;
  products = 0;
  for (; i < count; ++i) {
    sum += g[i];
    products += g[i] * (values[i] - centre);
  }
  if (count < L::kCount) return;
  s0.add(s1);
  q0.add(q1);
  sum += s0.sum();
  products += q0.sum();
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
