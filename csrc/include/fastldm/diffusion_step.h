// One sampling step over memory, as fastldm/ops/diffusion_step/reference.py defines it: the same
// operations in the same order, each rounded as it is there.
//
// A block of elements goes through the stages while it is in the nearest cache, so that every input
// is read from memory once and every output written once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fastldm/arithmetic.h"
#include "fastldm/philox.h"
#include "fastldm/storage.h"
#include "fastldm/sums.h"

namespace fastldm::step {

constexpr int kBlock = kNormalsPerCall;

enum class Prediction { kEpsilon, kSample, kVelocity };
enum class Sampler { kDDIM, kDDPM };
enum class Variance { kFixed, kLearned, kLearnedRange };

// What is the same for all elements of a sample; the names are those of coefficients.py.
template <typename T>
struct Scalars {
  T sqrt_alpha, sqrt_beta;
  T of_original;  // DDIM: SQRT_ALPHA_PREV, DDPM: ORIGINAL
  T of_other;     // DDIM: DIRECTION, DDPM: SAMPLE
  T sigma;
  T log_min, log_max;  // DDPM
  T guidance_scale;
  T lower, upper;  // limits of x0
  T deviation_ratio = 1;
};

template <typename T>
struct Step {
  Source sample, output, uncond, variance, noise;  // uncond, variance and noise may be null
  Target previous, original;
  int64_t batch = 0, size = 0;          // elements of a sample
  const Scalars<T>* scalars = nullptr;  // [B]
  Sampler sampler = Sampler::kDDIM;
  Prediction prediction = Prediction::kEpsilon;
  Variance variance_type = Variance::kFixed;
  bool divides_by_threshold = false, takes_epsilon_anew = false;
  T rescale = 0, keep = 1;         // phi and 1 - phi
  const int64_t* seeds = nullptr;  // [1] or [B], or null where no noise is drawn
  int64_t num_seeds = 0;
  uint64_t offset = 0;

  FASTLDM_INLINE int64_t blocks() const { return (size + kBlock - 1) / kBlock; }
};

// u + scale (c - u)
template <typename T>
FASTLDM_INLINE void guide(const T* __restrict__ c, const T* __restrict__ u, T scale, int count,
                          T* __restrict__ out) {
  for (int i = 0; i < count; ++i) out[i] = u[i] + scale * (c[i] - u[i]);
}

// x0 of the prediction, within its limits.
template <typename T>
FASTLDM_INLINE void predict(Prediction prediction, const T* __restrict__ x,
                            const T* __restrict__ out, const Scalars<T>& of, bool divides,
                            int count, T* __restrict__ raw, T* __restrict__ original) {
  switch (prediction) {
    case Prediction::kEpsilon:
      for (int i = 0; i < count; ++i) raw[i] = (x[i] - of.sqrt_beta * out[i]) / of.sqrt_alpha;
      break;
    case Prediction::kSample:
      for (int i = 0; i < count; ++i) raw[i] = out[i];
      break;
    case Prediction::kVelocity:
      for (int i = 0; i < count; ++i) raw[i] = of.sqrt_alpha * x[i] - of.sqrt_beta * out[i];
      break;
  }
  for (int i = 0; i < count; ++i) {
    const T above = raw[i] < of.lower ? of.lower : raw[i];
    original[i] = above > of.upper ? of.upper : above;
  }
  if (divides) {
    for (int i = 0; i < count; ++i) original[i] /= of.upper;
  }
}

template <typename T>
FASTLDM_INLINE void ddim_update(const Step<T>& step, const Scalars<T>& of, const T* __restrict__ x,
                                const T* __restrict__ out, const T* __restrict__ raw,
                                const T* __restrict__ original, int count,
                                T* __restrict__ previous) {
  const T to_original = of.of_original, direction = of.of_other;
  if (step.takes_epsilon_anew || step.prediction == Prediction::kSample) {
    const T* source = step.takes_epsilon_anew ? original : raw;
    for (int i = 0; i < count; ++i) {
      const T epsilon = (x[i] - of.sqrt_alpha * source[i]) / of.sqrt_beta;
      previous[i] = to_original * original[i] + direction * epsilon;
    }
  } else if (step.prediction == Prediction::kVelocity) {
    for (int i = 0; i < count; ++i) {
      const T epsilon = of.sqrt_alpha * out[i] + of.sqrt_beta * x[i];
      previous[i] = to_original * original[i] + direction * epsilon;
    }
  } else {
    for (int i = 0; i < count; ++i) previous[i] = to_original * original[i] + direction * out[i];
  }
}

// The deviation of the noise, for a learned variance.
template <bool kFused, typename T>
FASTLDM_INLINE void deviations(Variance type, const Scalars<T>& of, const T* __restrict__ variance,
                               int count, T* __restrict__ sigma) {
  if (type == Variance::kLearned) {
    for (int i = 0; i < count; ++i) sigma[i] = of.sigma * std::sqrt(variance[i]);
  } else {
    const ExpLimits<T> limits;
    for (int i = 0; i < count; ++i) {
      const T fraction = (variance[i] + T(1)) / T(2);
      const T logarithm = fraction * of.log_max + (T(1) - fraction) * of.log_min;
      sigma[i] = of.sigma * (T(2) * half_exp_of_negative<kFused>(T(-0.5) * logarithm, limits));
    }
  }
}

// Task: a block of the noise of a sample, of which it writes out the numbers.
template <typename T>
struct Noise {
  const int64_t* seeds;
  int64_t num_seeds, size;
  uint64_t offset;
  T* out;

  FASTLDM_INLINE int64_t blocks() const { return (size + kBlock - 1) / kBlock; }

  template <bool kFused>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks(), start = task % blocks() * kBlock;
      const int count = static_cast<int>(std::min<int64_t>(kBlock, size - start));
      make(b, start, count, out + b * size + start);
    }
  }

  FASTLDM_INLINE void make(int64_t b, int64_t start, int count, T* to) const {
    const bool one = num_seeds == 1;
    normals(static_cast<uint64_t>(seeds[one ? 0 : b]), offset, one ? b * size + start : start,
            count, to);
  }
};

// Task: a block of a sample.
template <typename T>
struct Update {
  Step<T> step;

  template <bool kFused>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) T of_sample[kBlock], of_output[kBlock], of_uncond[kBlock], guided[kBlock];
    alignas(64) T raw[kBlock], of_original[kBlock], of_previous[kBlock], of_noise[kBlock];
    alignas(64) T of_variance[kBlock], sigma[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / step.blocks(), start = task % step.blocks() * kBlock;
      const int64_t first = b * step.size + start;
      const int count = static_cast<int>(std::min<int64_t>(kBlock, step.size - start));
      const Scalars<T>& of = step.scalars[b];
      const T* x = read(step.sample, first, count, of_sample);
      const T* out = read(step.output, first, count, of_output);
      if (step.uncond.data) {
        guide(out, read(step.uncond, first, count, of_uncond), of.guidance_scale, count, guided);
        out = guided;
        if (step.rescale != 0) {
          for (int i = 0; i < count; ++i) {
            guided[i] = step.rescale * (guided[i] * of.deviation_ratio) + step.keep * guided[i];
          }
        }
      }
      T* original = room(step.original, first, of_original);
      T* previous = room(step.previous, first, of_previous);
      predict(step.prediction, x, out, of, step.divides_by_threshold, count, raw, original);
      if (step.sampler == Sampler::kDDIM) {
        ddim_update(step, of, x, out, raw, original, count, previous);
      } else {
        for (int i = 0; i < count; ++i) {
          previous[i] = of.of_original * original[i] + of.of_other * x[i];
        }
      }
      const T* noise = nullptr;
      if (step.noise.data) {
        noise = read(step.noise, first, count, of_noise);
      } else if (step.seeds) {
        const Noise<T> of_seed{step.seeds, step.num_seeds, step.size, step.offset, nullptr};
        of_seed.make(b, start, count, of_noise);
        noise = of_noise;
      }
      if (noise && step.variance_type != Variance::kFixed) {
        const T* variance = read(step.variance, first, count, of_variance);
        deviations<kFused>(step.variance_type, of, variance, count, sigma);
        for (int i = 0; i < count; ++i) previous[i] += sigma[i] * noise[i];
      } else if (noise) {
        for (int i = 0; i < count; ++i) previous[i] += of.sigma * noise[i];
      }
      flush(previous, step.previous, first, count);
      flush(original, step.original, first, count);
    }
  }
};

// Task: a sample. Its ratio of standard deviations, that of the conditional output to the guided.
template <typename T>
struct DeviationRatio {
  Step<T> step;
  Scalars<T>* scalars;

  template <bool kFused>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) T of_output[kBlock], of_uncond[kBlock], guided[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      Moments conditional, combined;
      for (int64_t start = 0; start < step.size; start += kBlock) {
        const int64_t first = b * step.size + start;
        const int count = static_cast<int>(std::min<int64_t>(kBlock, step.size - start));
        const T* out = read(step.output, first, count, of_output);
        guide(out, read(step.uncond, first, count, of_uncond), scalars[b].guidance_scale, count,
              guided);
        conditional.add(moments(out, count));
        combined.add(moments(guided, count));
      }
      scalars[b].deviation_ratio =
          static_cast<T>(deviation(conditional)) / static_cast<T>(deviation(combined));
    }
  }

  static FASTLDM_INLINE Moments moments(const T* values, int count) {
    const T centre = sum(values, count) / static_cast<T>(count);
    T about = 0, squares = 0;
    sum_deviations(values, count, centre, about, squares);
    return Moments::about(centre, count, about, squares);
  }

  static FASTLDM_INLINE double deviation(const Moments& of) {
    return std::sqrt(of.squares / (of.count - 1));
  }
};

}  // namespace fastldm::step
