#include "diffusion_step/cpu.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <limits>
#include <vector>

#include "fastldm/diffusion_step.h"
#include "parallel.h"
#include "tensor_memory.h"

namespace fastldm {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

step::Prediction prediction_of(const std::string& name) {
  if (name == "epsilon") return step::Prediction::kEpsilon;
  if (name == "sample") return step::Prediction::kSample;
  TORCH_CHECK(name == "v_prediction", "prediction_type: got ", name);
  return step::Prediction::kVelocity;
}

step::Form form_of(const std::string& sampler, bool takes_epsilon_anew) {
  if (sampler == "ddpm") return step::Form::kDDPM;
  return takes_epsilon_anew ? step::Form::kDDIMAnew : step::Form::kDDIM;
}

step::Variance variance_of(const std::string& name, bool is_given) {
  if (is_given && name == "learned") return step::Variance::kLearned;
  if (is_given && name == "learned_range") return step::Variance::kLearnedRange;
  return step::Variance::kFixed;
}

bool has_strides_of(const Tensor& value, const Tensor& sample) {
  for (int64_t dim = 0; dim < sample.dim(); ++dim) {
    if (sample.size(dim) != 1 && value.stride(dim) != sample.stride(dim)) return false;
  }
  return true;
}

// Numbers, or rows of them, for the batch or for each sample.
void check_scalars(const char* name, const OptionalTensor& value, bool is_floating,
                   at::IntArrayRef one, at::IntArrayRef each) {
  if (!value) return;
  const bool fits = value->sizes() == one || value->sizes() == each;
  TORCH_CHECK(fits && value->device().is_cpu() && value->is_floating_point() == is_floating, name,
              ": got ", value->scalar_type(), " of shape ", value->sizes(), " on ",
              value->device());
}

// `value` in the order in memory of `sample`.
Tensor arranged(const OptionalTensor& value, const Tensor& sample) {
  if (!value) return {};
  TORCH_CHECK(value->device().is_cpu() && value->sizes() == sample.sizes(),
              "expected a CPU tensor in the shape of the sample");
  if (has_strides_of(*value, sample)) return *value;
  return at::empty_like(sample, sample.options().dtype(value->scalar_type())).copy_(*value);
}

// Whether each sample of the batch is a piece of memory, one behind the other.
bool is_sample_by_sample(const Tensor& sample) {
  return sample.is_non_overlapping_and_dense() &&
         (sample.size(0) <= 1 || sample.stride(0) * sample.size(0) == sample.numel());
}

template <typename T>
std::vector<T> values_of(const OptionalTensor& tensor, at::ScalarType type) {
  if (!tensor) return {};
  const bool as_it_is = tensor->scalar_type() == type && tensor->is_contiguous();
  const Tensor dense = as_it_is ? *tensor : tensor->to(type).contiguous();
  const T* data = dense.const_data_ptr<T>();
  return std::vector<T>(data, data + dense.numel());
}

// The entry of row b, where there may be one row for all.
template <typename T>
T entry(const std::vector<T>& table, int64_t width, int64_t b, int64_t column) {
  return table[(static_cast<int64_t>(table.size()) == width ? 0 : b * width) + column];
}

struct Options {
  std::optional<double> clip_range;
  double guidance_scale, guidance_rescale;
};

template <typename T>
std::vector<step::Scalars<T>> scalars_of(const step::Step<T>& step, const Options& options,
                                         const Tensor& coefficients,
                                         const OptionalTensor& threshold,
                                         const OptionalTensor& guidance_scales) {
  const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  const bool is_ddpm = step.form == step::Form::kDDPM;
  const int64_t width = is_ddpm ? 7 : 5;
  check_scalars("coefficients", coefficients, true, {width}, {step.batch, width});
  check_scalars("threshold", threshold, true, {step.batch}, {step.batch});
  check_scalars("guidance_scales", guidance_scales, true, {}, {step.batch});
  TORCH_CHECK(!threshold || !options.clip_range, "threshold: given beside clip_range");
  const std::vector<T> table = values_of<T>(coefficients, type);
  const std::vector<T> bounds = values_of<T>(threshold, type);
  const std::vector<T> scales = values_of<T>(guidance_scales, type);
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  std::vector<step::Scalars<T>> scalars(step.batch);
  for (int64_t b = 0; b < step.batch; ++b) {
    step::Scalars<T>& of = scalars[b];
    of.sqrt_alpha = entry(table, width, b, 0);
    of.sqrt_beta = entry(table, width, b, 1);
    of.of_original = entry(table, width, b, 2);
    of.of_other = entry(table, width, b, 3);
    of.sigma = entry(table, width, b, 4);
    of.log_min = is_ddpm ? entry(table, width, b, 5) : T(0);
    of.log_max = is_ddpm ? entry(table, width, b, 6) : T(0);
    of.guidance_scale =
        scales.empty() ? static_cast<T>(options.guidance_scale) : entry(scales, 1, b, 0);
    of.upper = options.clip_range ? static_cast<T>(*options.clip_range) : kInfinity;
    if (!bounds.empty()) of.upper = bounds[b];
    of.lower = -of.upper;
  }
  return scalars;
}

template <typename T>
void update(step::Step<T>& step, const Options& options, const Tensor& coefficients,
            const OptionalTensor& threshold, const OptionalTensor& guidance_scales) {
  std::vector<step::Scalars<T>> scalars =
      scalars_of(step, options, coefficients, threshold, guidance_scales);
  step.scalars = scalars.data();
  if (threshold) step.limit = step::Limit::kThreshold;
  step.rescale = static_cast<T>(options.guidance_rescale);
  step.keep = static_cast<T>(1 - options.guidance_rescale);
  if (step.uncond.data && step.rescale != 0) {
    run_tasks(step.batch, step.size, step::DeviationRatio<T>{step, scalars.data()});
  }
  run_tasks(step.batch * step.blocks(), step::kBlock, step::Update<T>{step});
}

}  // namespace

std::tuple<Tensor, Tensor> diffusion_step_fwd(
    const std::string& sampler, const Tensor& sample, const Tensor& model_output,
    const Tensor& coefficients, const std::string& prediction_type,
    std::optional<double> clip_range, const OptionalTensor& threshold,
    bool use_clipped_model_output, const std::string& variance_type,
    const OptionalTensor& predicted_variance, const OptionalTensor& model_output_uncond,
    double guidance_scale, const OptionalTensor& guidance_scales, double guidance_rescale,
    const OptionalTensor& noise, const OptionalTensor& seed, const OptionalTensor& offset,
    bool return_original) {
  TORCH_CHECK(sample.device().is_cpu() && sample.dim() > 0,
              "sample: expected a CPU tensor [B, ...]");
  const bool in_place = is_sample_by_sample(sample);
  const Tensor x = in_place ? sample : sample.contiguous();
  const Tensor output = arranged(model_output, x), uncond = arranged(model_output_uncond, x);
  const Tensor variance = arranged(predicted_variance, x);
  check_scalars("seed", seed, false, {1}, {x.size(0)});
  check_scalars("offset", offset, false, {}, {});
  TORCH_CHECK(!seed || (offset && !noise), "seed: given without offset, or beside noise");
  const std::vector<int64_t> seeds = values_of<int64_t>(seed, at::kLong);
  const uint64_t position = offset ? static_cast<uint64_t>(offset->item<int64_t>()) : 0;
  const Tensor previous = at::empty_like(x);
  const Tensor original = return_original ? at::empty_like(x) : Tensor();

  const auto run = [&](auto zero) {
    using T = decltype(zero);
    step::Step<T> step;
    step.batch = x.size(0);
    step.size = step.batch ? x.numel() / step.batch : 0;
    Tensor given = arranged(noise, x);
    if (!seeds.empty() && x.is_contiguous()) {
      step.seeds = seeds.data();
      step.num_seeds = static_cast<int64_t>(seeds.size());
      step.offset = position;
    } else if (!seeds.empty()) {
      // The numbers are counted row by row, and the memory is in another order.
      given = at::empty(x.sizes(), x.options().dtype(c10::CppTypeToScalarType<T>::value));
      const step::Noise<T> task{seeds.data(), static_cast<int64_t>(seeds.size()), step.size,
                                position, given.mutable_data_ptr<T>()};
      run_tasks(step.batch * task.blocks(), step::kBlock, task);
      given = arranged(given, x);
    }
    step.sample = source(x);
    step.output = source(output);
    step.uncond = source(uncond);
    step.variance = source(variance);
    step.noise = source(given);
    step.previous = target(previous);
    step.original = target(original);
    step.form = form_of(sampler, use_clipped_model_output);
    step.prediction = prediction_of(prediction_type);
    step.variance_type = variance_of(variance_type, variance.defined());
    update(step, {clip_range, guidance_scale, guidance_rescale}, coefficients, threshold,
           guidance_scales);
  };
  if (x.scalar_type() == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
  const auto arranged_as_sample = [&](const Tensor& result) {
    return in_place ? result : at::empty_like(sample).copy_(result);
  };
  return {arranged_as_sample(previous),
          return_original ? arranged_as_sample(original) : at::empty({0}, sample.options())};
}

}  // namespace fastldm
