// GEGLU on the CPU; shapes and meaning as in fastldm/ops/geglu.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastldm {

// [..., 2 D] -> [..., D], contiguous.
at::Tensor geglu_fwd(const at::Tensor& hidden_states);

// The gradient of hidden_states, contiguous.
at::Tensor geglu_bwd(const at::Tensor& grad_y, const at::Tensor& hidden_states);

}  // namespace fastldm
