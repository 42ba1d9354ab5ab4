// GroupNorm + SiLU on the CPU; shapes and meaning as in fastldm/ops/group_norm_silu.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastldm {

using OptionalTensor = std::optional<at::Tensor>;

// Returns y in the layout of x.
at::Tensor group_norm_silu(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps, bool silu,
                           const OptionalTensor& channel_add, const OptionalTensor& residual,
                           const OptionalTensor& scale, const OptionalTensor& shift);

// Returns y in the layout of x, the mean and 1/sqrt(variance + eps).
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu_fwd(
    const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, bool silu, const OptionalTensor& channel_add,
    const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& shift);

// Returns the gradients of x, weight, bias, channel_add, scale and shift, [0] where not wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
group_norm_silu_bwd(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                    const at::Tensor& rstd, int64_t num_groups, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, bool silu,
                    const OptionalTensor& channel_add, const OptionalTensor& residual,
                    const OptionalTensor& scale, const OptionalTensor& shift,
                    const std::vector<bool>& wanted);

}  // namespace fastldm
