// The sampling steps on the CPU; shapes and meaning as in fastldm/ops/diffusion_step.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace fastldm {

// sampler: "ddim" or "ddpm". Returns the previous and the original sample, like `sample`; the
// original is [0] where it is not wanted.
std::tuple<at::Tensor, at::Tensor> diffusion_step_fwd(
    const std::string& sampler, const at::Tensor& sample, const at::Tensor& model_output,
    const at::Tensor& coefficients, const std::string& prediction_type,
    std::optional<double> clip_range, const std::optional<at::Tensor>& threshold,
    bool use_clipped_model_output, const std::string& variance_type,
    const std::optional<at::Tensor>& predicted_variance,
    const std::optional<at::Tensor>& model_output_uncond, double guidance_scale,
    const std::optional<at::Tensor>& guidance_scales, double guidance_rescale,
    const std::optional<at::Tensor>& noise, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& offset, bool return_original);

}  // namespace fastldm
