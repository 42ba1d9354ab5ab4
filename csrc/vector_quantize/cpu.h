// The nearest-codebook lookup on the CPU; shapes and meaning as in fastldm/ops/vector_quantize.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

namespace fastldm {

// codebook: contiguous, float or double. Returns z_q like z, indices, the mean squared distance in
// the codebook's dtype, and which argument holds NaN, "" where none does (else the rest means
// nothing).
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::string> vector_quantize_fwd(
    const at::Tensor& z, const at::Tensor& codebook, int64_t channel_dim);

// Returns the gradient of z, like z, and that of the codebook in its dtype.
std::tuple<at::Tensor, at::Tensor> vector_quantize_bwd(
    const at::Tensor& grad_z_q, double grad_codebook_loss, double grad_commitment_loss,
    const at::Tensor& z, const at::Tensor& codebook, const at::Tensor& indices,
    int64_t channel_dim);

// Returns how many latents have each code, int64 [K], and their sums, [K, D], float32 or, for
// double z, float64.
std::tuple<at::Tensor, at::Tensor> codebook_statistics(const at::Tensor& z,
                                                       const at::Tensor& indices,
                                                       int64_t num_embeddings, int64_t channel_dim);

}  // namespace fastldm
