// Attention on the CPU; shapes and meaning as in fastldm/ops/cross_attention.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastldm {

// Returns [B, Lq, H, D], contiguous.
at::Tensor cross_attention_fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               double scale, const std::optional<at::Tensor>& key_mask);

// Returns the gradients of q, k and v, contiguous, [0] where not wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_attention_bwd(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    double scale, const std::optional<at::Tensor>& key_mask, const std::vector<bool>& wanted);

}  // namespace fastldm
