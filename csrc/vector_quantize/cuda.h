// The nearest-codebook lookup on CUDA; shapes and meaning as in fastldm/ops/vector_quantize.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace fastldm::cuda {

// codebook: contiguous, float. Returns z_q like z, indices, the mean squared distance, and whether
// [z, codebook] hold NaN, bool [2]. Nothing is read back, so a CUDA graph may capture it; there a
// latent with NaN gets index 0, as every latent does where a code holds NaN, and the loss is NaN.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> vector_quantize_fwd(
    const at::Tensor& z, const at::Tensor& codebook, int64_t channel_dim);

// Returns the gradient of z, like z, and that of the codebook, float.
std::tuple<at::Tensor, at::Tensor> vector_quantize_bwd(
    const at::Tensor& grad_z_q, const at::Tensor& grad_codebook_loss,
    const at::Tensor& grad_commitment_loss, const at::Tensor& z, const at::Tensor& codebook,
    const at::Tensor& indices, int64_t channel_dim);

// As the CPU's; indices are not checked.
std::tuple<at::Tensor, at::Tensor> codebook_statistics(const at::Tensor& z,
                                                       const at::Tensor& indices,
                                                       int64_t num_embeddings, int64_t channel_dim);

}  // namespace fastldm::cuda
