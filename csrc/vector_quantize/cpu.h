// The nearest-codebook lookup on the CPU; shapes and meaning as in fastldm/ops/vector_quantize.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace fastldm {

// codebook: contiguous, float or double. Returns z_q like z, indices, the mean squared distance in
// the codebook's dtype, and whether z holds NaN (then the rest means nothing).
std::tuple<at::Tensor, at::Tensor, at::Tensor, bool> vector_quantize_fwd(const at::Tensor& z,
                                                                         const at::Tensor& codebook,
                                                                         int64_t channel_dim);

// Returns the gradient of z, like z, and that of the codebook in its dtype.
std::tuple<at::Tensor, at::Tensor> vector_quantize_bwd(const at::Tensor& grad_z_q,
                                                       double grad_codebook_loss,
                                                       double grad_commitment_loss,
                                                       const at::Tensor& z,
                                                       const at::Tensor& codebook,
                                                       const at::Tensor& indices,
                                                       int64_t channel_dim);

}  // namespace fastldm
