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
enum class Form { kDDIM, kDDIMAnew, kDDPM };  // anew: epsilon is taken from the limited x0
enum class Limit { kRange, kThreshold };      // the threshold divides what it has limited
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
  Target previous, original;                       // original may be null
  int64_t batch = 0, size = 0;                     // elements of a sample
  const Scalars<T>* scalars = nullptr;             // [B]
  Form form = Form::kDDIM;
  Limit limit = Limit::kRange;
  Prediction prediction = Prediction::kEpsilon;
  Variance variance_type = Variance::kFixed;
  T rescale = 0, keep = 1;         // phi and 1 - phi
  const int64_t* seeds = nullptr;  // [1] or [B], or null where no noise is drawn
  int64_t num_seeds = 0;
  uint64_t offset = 0;

  FASTLDM_INLINE int64_t blocks() const { return (size + kBlock - 1) / kBlock; }
};

// u + scale (c - u)
template <typename T>
FASTLDM_INLINE T guide(T c, T u, T scale) {
  return u + scale * (c - u);
}

// x0 of the prediction, before it is limited.
template <Prediction kPrediction, typename T>
FASTLDM_INLINE T predict(const Scalars<T>& of, T x, T out) {
  if constexpr (kPrediction == Prediction::kEpsilon) {
    return (x - of.sqrt_beta * out) / of.sqrt_alpha;
  } else if constexpr (kPrediction == Prediction::kVelocity) {
    return of.sqrt_alpha * x - of.sqrt_beta * out;
  } else {
    return out;
  }
}

// What the update adds to x0: epsilon, or with DDPM the sample.
template <Form kForm, Prediction kPrediction, typename T>
FASTLDM_INLINE T other(const Scalars<T>& of, T x, T out, T raw, T original) {
  if constexpr (kForm == Form::kDDPM) {
    return x;
  } else if constexpr (kForm == Form::kDDIMAnew) {
    return (x - of.sqrt_alpha * original) / of.sqrt_beta;
  } else if constexpr (kPrediction == Prediction::kSample) {
    return (x - of.sqrt_alpha * raw) / of.sqrt_beta;
  } else if constexpr (kPrediction == Prediction::kVelocity) {
    return of.sqrt_alpha * out + of.sqrt_beta * x;
  } else {
    return out;
  }
}

template <typename T>
struct Block {
  const T *x, *out, *uncond;  // uncond is null where nothing is left to guide
  int count;
  T *original, *previous;
};

template <bool kGuided, Limit kLimit, Form kForm, Prediction kPrediction, typename T>
FASTLDM_INLINE void update(const Scalars<T>& of, const T* __restrict__ x, const T* __restrict__ out,
                           const T* __restrict__ uncond, int count, T* __restrict__ original,
                           T* __restrict__ previous) {
  for (int i = 0; i < count; ++i) {
    T output = out[i];
    if constexpr (kGuided) output = guide(output, uncond[i], of.guidance_scale);
    const T raw = predict<kPrediction>(of, x[i], output);
    const T above = raw < of.lower ? of.lower : raw;
    T limited = above > of.upper ? of.upper : above;
    if constexpr (kLimit == Limit::kThreshold) limited /= of.upper;
    original[i] = limited;
    previous[i] = of.of_original * limited +
                  of.of_other * other<kForm, kPrediction>(of, x[i], output, raw, limited);
  }
}

template <bool kGuided, Limit kLimit, Form kForm, typename T>
FASTLDM_INLINE void update(const Step<T>& step, const Scalars<T>& of, const Block<T>& in) {
  const auto [x, out, uncond, count, original, previous] = in;
  switch (step.prediction) {
    case Prediction::kEpsilon:
      return update<kGuided, kLimit, kForm, Prediction::kEpsilon>(of, x, out, uncond, count,
                                                                  original, previous);
    case Prediction::kSample:
      return update<kGuided, kLimit, kForm, Prediction::kSample>(of, x, out, uncond, count,
                                                                 original, previous);
    case Prediction::kVelocity:
      return update<kGuided, kLimit, kForm, Prediction::kVelocity>(of, x, out, uncond, count,
                                                                   original, previous);
  }
}

template <bool kGuided, Limit kLimit, typename T>
FASTLDM_INLINE void update(const Step<T>& step, const Scalars<T>& of, const Block<T>& in) {
  switch (step.form) {
    case Form::kDDIM:
      return update<kGuided, kLimit, Form::kDDIM>(step, of, in);
    case Form::kDDIMAnew:
      return update<kGuided, kLimit, Form::kDDIMAnew>(step, of, in);
    case Form::kDDPM:
      return update<kGuided, kLimit, Form::kDDPM>(step, of, in);
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
      const T negative = T(-0.5) * logarithm;
      T half;
      half_exp_of_negative<kFused, 1>(&negative, limits, &half);
      sigma[i] = of.sigma * (T(2) * half);
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

  template <typename Processor>
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

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) T of_sample[kBlock], of_output[kBlock], of_uncond[kBlock], guided[kBlock];
    alignas(64) T of_original[kBlock], of_previous[kBlock], of_noise[kBlock];
    alignas(64) T of_variance[kBlock], sigma[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / step.blocks(), start = task % step.blocks() * kBlock;
      const int64_t first = b * step.size + start;
      const int count = static_cast<int>(std::min<int64_t>(kBlock, step.size - start));
      const Scalars<T>& of = step.scalars[b];
      Block<T> in{read(step.sample, first, count, of_sample),
                  read(step.output, first, count, of_output),
                  nullptr,
                  count,
                  step.original.data ? room(step.original, first, of_original) : of_original,
                  room(step.previous, first, of_previous)};
      if (step.uncond.data) in.uncond = read(step.uncond, first, count, of_uncond);
      if (in.uncond && (step.rescale != 0 || step.limit == Limit::kThreshold)) {
        guide_and_rescale(of, in, guided);
        in.out = guided;
        in.uncond = nullptr;
      }
      if (in.uncond) {
        update<true, Limit::kRange>(step, of, in);
      } else if (step.limit == Limit::kRange) {
        update<false, Limit::kRange>(step, of, in);
      } else {
        update<false, Limit::kThreshold>(step, of, in);
      }
      add_noise<Processor::kFused>(of, b, start, in, of_noise, of_variance, sigma);
      flush(in.previous, step.previous, first, count);
      if (step.original.data) flush(in.original, step.original, first, count);
    }
  }

  FASTLDM_INLINE void guide_and_rescale(const Scalars<T>& of, const Block<T>& in,
                                        T* __restrict__ guided) const {
    const T* __restrict__ out = in.out, * __restrict__ uncond = in.uncond;
    for (int i = 0; i < in.count; ++i) guided[i] = guide(out[i], uncond[i], of.guidance_scale);
    if (step.rescale == 0) return;
    for (int i = 0; i < in.count; ++i) {
      guided[i] = step.rescale * (guided[i] * of.deviation_ratio) + step.keep * guided[i];
    }
  }

  template <bool kFused>
  FASTLDM_INLINE void add_noise(const Scalars<T>& of, int64_t b, int64_t start, const Block<T>& in,
                                T* of_noise, T* of_variance, T* sigma) const {
    const int64_t first = b * step.size + start;
    const T* noise = of_noise;
    T* __restrict__ previous = in.previous;
    if (step.noise.data) {
      noise = read(step.noise, first, in.count, of_noise);
    } else if (step.seeds) {
      const Noise<T> of_seed{step.seeds, step.num_seeds, step.size, step.offset, nullptr};
      of_seed.make(b, start, in.count, of_noise);
    } else {
      return;
    }
    if (step.variance_type == Variance::kFixed) {
      for (int i = 0; i < in.count; ++i) previous[i] += of.sigma * noise[i];
    } else {
      const T* variance = read(step.variance, first, in.count, of_variance);
      deviations<kFused>(step.variance_type, of, variance, in.count, sigma);
      for (int i = 0; i < in.count; ++i) previous[i] += sigma[i] * noise[i];
    }
  }
};

// Task: a sample. Its ratio of standard deviations, that of the conditional output to the guided.
template <typename T>
struct DeviationRatio {
  Step<T> step;
  Scalars<T>* scalars;

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) T of_output[kBlock], of_uncond[kBlock], guided[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      const T scale = scalars[b].guidance_scale;
      Moments conditional, combined;
      for (int64_t start = 0; start < step.size; start += kBlock) {
        const int64_t first = b * step.size + start;
        const int count = static_cast<int>(std::min<int64_t>(kBlock, step.size - start));
        const T* out = read(step.output, first, count, of_output);
        const T* uncond = read(step.uncond, first, count, of_uncond);
        for (int i = 0; i < count; ++i) guided[i] = guide(out[i], uncond[i], scale);
        conditional.add(moments<Processor>(out, count));
        combined.add(moments<Processor>(guided, count));
      }
      scalars[b].deviation_ratio =
          static_cast<T>(deviation(conditional)) / static_cast<T>(deviation(combined));
    }
  }

  template <typename Processor>
  static FASTLDM_INLINE Moments moments(const T* values, int count) {
    const T centre = sum<Processor>(values, count) / static_cast<T>(count);
    T about = 0, squares = 0;
    sum_deviations<Processor>(values, count, centre, about, squares);
    return Moments::about(centre, count, about, squares);
  }

  static FASTLDM_INLINE double deviation(const Moments& of) {
    return std::sqrt(of.squares / (of.count - 1));
  }
};

}  // namespace fastldm::step
