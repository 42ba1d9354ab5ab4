// value · gelu(gate) on one processor core, as fastldm/ops/geglu/reference.py defines it.
//
// gelu(u) = u Φ(u) with the normal distribution Φ. Its tail Q(a) = Φ(-a), a = |u|, is exp(-a²/2)
// times a smooth function, so nothing cancels for a negative gate, and the density that the
// derivative Φ(u) + u φ(u) needs comes from the same exponential.
#pragma once

#include <cstdint>

#include "fastldm/arithmetic.h"
#include "fastldm/parts.h"
#include "fastldm/storage.h"

namespace fastldm::geglu {

// Elements of a row that a task takes at most: they stay in the nearest cache.
constexpr int64_t kPart = 1024;

// Rows with neighbouring elements, `stride` elements apart.
struct Rows {
  Source source;
  int64_t stride;

  FASTLDM_INLINE const float* at(int64_t row, int64_t first, int64_t count, float* buffer) const {
    return read(source, row * stride + first, count, buffer);
  }
};

// The normal distribution at u, and √(π/2) of its density.
struct Normal {
  float distribution, density;
};

template <bool kFused>
FASTLDM_INLINE Normal normal(float u, const ExpLimits<float>& limits) {
  // Interpolates 2 (a + 13/4) exp(a²/2) Q(a) in t = (a - 13/4)/(a + 13/4) (the variable of Shepherd
  // and Laframboise, Math. Comp. 36, 1981) at the Chebyshev nodes of a <= 13.2, beyond which the
  // tail is no normal float; relative error 3.7e-8.
  constexpr float kPolynomial[] = {
      1.47487676f,   -1.07897341f,    0.548907995f,    -0.161849454f,   0.00219182135f,
      0.0166107453f, -0.00231577945f, -0.00210203277f, 0.000270097575f, 0.000245097704f};
  constexpr float kCentre = 3.25f;
  const float a = u < 0 ? -u : u;
  const float square = 0.5f * u * u;
  float power;
  half_exp_of_negative<kFused, 1>(&square, limits, &power);
  // Exactly 0 in the end, as -inf has to give NaN and the largest float 0.
  const float half = square > limits.largest ? 0.0f : power;
  const float inverse = 1.0f / (a + kCentre);
  const float t = multiply_add<kFused>(inverse, -2 * kCentre, 1.0f);
  const float tail = half * (inverse * polynomial<kFused>(kPolynomial, t));
  return {u < 0 ? tail : 1.0f - tail, half};
}

template <bool kFused>
FASTLDM_INLINE void forward(const float* __restrict__ value, const float* __restrict__ gate,
                            int64_t count, const ExpLimits<float>& limits, float* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = value[i] * (gate[i] * normal<kFused>(gate[i], limits).distribution);
  }
}

template <bool kFused>
FASTLDM_INLINE void backward(const float* __restrict__ grad, const float* __restrict__ value,
                             const float* __restrict__ gate, int64_t count,
                             const ExpLimits<float>& limits, float* __restrict__ grad_value,
                             float* __restrict__ grad_gate) {
  constexpr float kDensity = 0.797884561f;  // √(2/π)
  for (int64_t i = 0; i < count; ++i) {
    const Normal at = normal<kFused>(gate[i], limits);
    grad_value[i] = grad[i] * (gate[i] * at.distribution);
    const float slope = multiply_add<kFused>(gate[i] * kDensity, at.density, at.distribution);
    grad_gate[i] = grad[i] * (value[i] * slope);
  }
}

// Task: a part of a row, [value | gate] of `width` each.
struct Forward {
  Rows hidden_states;
  Target y;  // [rows, width]
  int64_t width = 0;

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) float of_value[kPart], of_gate[kPart], rounded[kPart];
    const ExpLimits<float> limits;
    const Parts parts(width, kPart);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts.count, part = task % parts.count;
      const int64_t first = parts.first(part), count = parts.size(part);
      const float* value = hidden_states.at(row, first, count, of_value);
      const float* gate = hidden_states.at(row, width + first, count, of_gate);
      const int64_t to = row * width + first;
      forward<Processor::kFused>(value, gate, count, limits, room(y, to, rounded));
      flush(rounded, y, to, count);
    }
  }
};

struct Backward {
  Rows hidden_states, grad_y;
  Target gradient;  // [rows, 2 width]
  int64_t width = 0;

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) float of_value[kPart], of_gate[kPart], of_grad[kPart];
    alignas(64) float value_rounded[kPart], gate_rounded[kPart];
    const ExpLimits<float> limits;
    const Parts parts(width, kPart);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts.count, part = task % parts.count;
      const int64_t first = parts.first(part), count = parts.size(part);
      const float* value = hidden_states.at(row, first, count, of_value);
      const float* gate = hidden_states.at(row, width + first, count, of_gate);
      const float* grad = grad_y.at(row, first, count, of_grad);
      const int64_t to = 2 * row * width + first;
      backward<Processor::kFused>(grad, value, gate, count, limits,
                                  room(gradient, to, value_rounded),
                                  room(gradient, to + width, gate_rounded));
      flush(value_rounded, gradient, to, count);
      flush(gate_rounded, gradient, to + width, count);
    }
  }
};

}  // namespace fastldm::geglu
