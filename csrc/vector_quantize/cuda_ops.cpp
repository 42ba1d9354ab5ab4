#ifdef FASTLDM_WITH_CUDA

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>
#include <vector>

#include "vector_quantize/cuda.h"
#include "vector_quantize/cuda_kernels.h"

namespace fastldm::cuda {
namespace {

using device::Access;
using device::Dtype;
using device::Latents;

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_CHECK(false, "no kernel for ", tensor.scalar_type());
  }
}

// How a thread can read kRun of them at once.
Access access_of(const Latents& latents, int64_t depth, int64_t element_size) {
  if (latents.dims == 0) return Access::kScattered;
  const int inner = latents.dims - 1;
  const int64_t lanes = 16 / element_size;
  bool aligned = reinterpret_cast<uintptr_t>(latents.data) % 16 == 0;
  for (int dim = 0; dim < inner; ++dim) aligned &= latents.strides[dim] % lanes == 0;
  if (!aligned) return Access::kScattered;
  const bool whole_runs = latents.sizes[inner] % device::kRun == 0;
  if (latents.channel_stride == 1) {
    const bool narrow = depth <= device::kMaxNarrow;
    if (narrow ? whole_runs && latents.strides[inner] == depth
               : depth % device::kRun == 0 && latents.strides[inner] % lanes == 0)
      return Access::kAlongChannels;
  }
  const bool runs = latents.strides[inner] == 1 && latents.channel_stride % lanes == 0;
  return runs && whole_runs ? Access::kAlongLatents : Access::kScattered;
}

// The latents of a tensor, with dimensions that lie in one another made one.
Latents latents_of(const at::Tensor& tensor, int64_t channel_dim) {
  Latents latents{};
  latents.data = tensor.const_data_ptr();
  latents.dtype = dtype_of(tensor);
  latents.channel_stride = tensor.stride(channel_dim);
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (dim == channel_dim || size == 1) continue;
    const int last = latents.dims - 1;
    if (last >= 0 && latents.strides[last] == stride * size) {
      latents.sizes[last] *= size;
      latents.strides[last] = stride;
      continue;
    }
    TORCH_CHECK(latents.dims < Latents::kMaxDims, "z: too many dimensions");
    latents.sizes[latents.dims] = size;
    latents.strides[latents.dims++] = stride;
  }
  latents.access = access_of(latents, tensor.size(channel_dim), tensor.element_size());
  return latents;
}

void check(const at::Tensor& z, const at::Tensor& codebook, int64_t channel_dim) {
  TORCH_CHECK(z.is_cuda() && codebook.device() == z.device(), "expected tensors of one GPU");
  TORCH_CHECK(codebook.dim() == 2 && codebook.is_contiguous() && codebook.size(0) > 0 &&
                  codebook.scalar_type() == at::kFloat,
              "codebook: expected a contiguous float [K, D]");
  TORCH_CHECK(codebook.size(0) <= std::numeric_limits<int32_t>::max(), "codebook: too many codes");
  TORCH_CHECK(0 <= channel_dim && channel_dim < z.dim(), "channel_dim: out of range");
  TORCH_CHECK(z.size(channel_dim) == codebook.size(1), "z and codebook differ in D");
}

void sum_by_code(const at::Tensor& z, int64_t channel_dim, const at::Tensor& indices,
                 SumByCodeArguments call, at::Tensor& sums, cudaStream_t stream) {
  // Stable: equal codes keep the order of the latents, in which they are summed.
  const auto [sorted, order] = at::sort(indices.reshape({-1}).to(at::kInt), /*stable=*/true,
                                        /*dim=*/0, /*descending=*/false);
  call.z = latents_of(z, channel_dim);
  call.sorted = sorted.const_data_ptr<int32_t>();
  call.order = order.const_data_ptr<int64_t>();
  call.num_latents = indices.numel();
  call.num_codes = sums.size(0);
  call.depth = sums.size(1);
  call.sums = sums.mutable_data_ptr<float>();
  C10_CUDA_CHECK(launch_sum_by_code(call, stream));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> vector_quantize_fwd(
    const at::Tensor& z, const at::Tensor& codebook, int64_t channel_dim) {
  check(z, codebook, channel_dim);
  const c10::cuda::CUDAGuard guard(z.device());
  int processors = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, z.get_device()));

  at::Tensor z_q = at::empty_like(z);
  std::vector<int64_t> shape = z.sizes().vec();
  shape.erase(shape.begin() + channel_dim);
  at::Tensor indices = at::empty(shape, z.options().dtype(at::kLong));
  const auto floats = codebook.options(), ints = floats.dtype(at::kInt);
  at::Tensor loss = at::empty({}, floats);
  at::Tensor holds_nan = at::empty({2}, z.options().dtype(at::kBool));
  const int64_t num_codes = codebook.size(0), depth = codebook.size(1);
  const ForwardPlan plan(indices.numel(), num_codes, depth, processors);
  at::Tensor centre = at::empty({depth}, floats);
  at::Tensor codes =
      at::empty({plan.padded_codes, plan.narrow ? depth + 1 : plan.padded_depth}, floats);
  at::Tensor minus_half_square = at::empty({plan.narrow ? 0 : plan.padded_codes}, floats);
  at::Tensor code_norms = at::empty({plan.prepare_blocks}, floats);
  at::Tensor code_nans = at::empty({plan.prepare_blocks}, ints);
  at::Tensor scores = at::empty({2, plan.splits, plan.padded_latents}, floats);
  at::Tensor chunks = at::empty({plan.splits, plan.padded_latents}, ints);
  at::Tensor losses = at::empty({plan.finish_blocks}, floats.dtype(at::kDouble));
  at::Tensor latent_nans = at::empty({plan.finish_blocks}, ints);

  ForwardArguments call{};
  call.z = latents_of(z, channel_dim);
  call.z_q = latents_of(z_q, channel_dim);
  call.z_q_data = z_q.mutable_data_ptr();
  call.codebook = codebook.const_data_ptr<float>();
  call.num_latents = indices.numel();
  call.num_codes = num_codes;
  call.depth = depth;
  call.indices = indices.mutable_data_ptr<int64_t>();
  call.loss = loss.mutable_data_ptr<float>();
  call.holds_nan = holds_nan.mutable_data_ptr<bool>();
  call.centre = centre.mutable_data_ptr<float>();
  call.codes = codes.mutable_data_ptr<float>();
  call.minus_half_square = minus_half_square.mutable_data_ptr<float>();
  call.code_norms = code_norms.mutable_data_ptr<float>();
  call.code_nans = code_nans.mutable_data_ptr<int32_t>();
  call.scores = scores.mutable_data_ptr<float>();
  call.chunks = chunks.mutable_data_ptr<int32_t>();
  call.losses = losses.mutable_data_ptr<double>();
  call.latent_nans = latent_nans.mutable_data_ptr<int32_t>();
  C10_CUDA_CHECK(launch_forward(plan, call, c10::cuda::getCurrentCUDAStream()));
  return {z_q, indices, loss, holds_nan};
}

std::tuple<at::Tensor, at::Tensor> vector_quantize_bwd(
    const at::Tensor& grad_z_q, const at::Tensor& grad_codebook_loss,
    const at::Tensor& grad_commitment_loss, const at::Tensor& z, const at::Tensor& codebook,
    const at::Tensor& indices, int64_t channel_dim) {
  check(z, codebook, channel_dim);
  TORCH_CHECK(grad_z_q.sizes() == z.sizes() && grad_z_q.scalar_type() == z.scalar_type(),
              "grad_z_q: expected the shape and dtype of z");
  const c10::cuda::CUDAGuard guard(z.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor dense_indices = indices.contiguous();
  const at::Tensor to_latent = grad_commitment_loss.to(at::kFloat);
  const at::Tensor to_code = grad_codebook_loss.to(at::kFloat);
  at::Tensor grad_z = at::empty_like(z);
  at::Tensor grad_codebook = at::empty_like(codebook);
  const float share =
      z.numel() == 0 ? 0.0f : static_cast<float>(2.0 / static_cast<double>(z.numel()));

  GradLatentsArguments call{};
  call.grad_z_q = latents_of(grad_z_q, channel_dim);
  call.z = latents_of(z, channel_dim);
  call.grad_z = latents_of(grad_z, channel_dim);
  call.grad_z_data = grad_z.mutable_data_ptr();
  call.codebook = codebook.const_data_ptr<float>();
  call.indices = dense_indices.const_data_ptr<int64_t>();
  call.grad_loss = to_latent.const_data_ptr<float>();
  call.share = share;
  call.num_latents = indices.numel();
  call.depth = codebook.size(1);
  C10_CUDA_CHECK(launch_grad_latents(call, stream));

  SumByCodeArguments sum{};
  sum.origin = codebook.const_data_ptr<float>();
  sum.factor = to_code.const_data_ptr<float>();
  sum.share = -share;
  sum_by_code(z, channel_dim, dense_indices, sum, grad_codebook, stream);
  return {grad_z, grad_codebook};
}

std::tuple<at::Tensor, at::Tensor> codebook_statistics(const at::Tensor& z,
                                                       const at::Tensor& indices,
                                                       int64_t num_embeddings,
                                                       int64_t channel_dim) {
  TORCH_CHECK(z.is_cuda() && indices.device() == z.device(), "expected tensors of one GPU");
  TORCH_CHECK(indices.numel() * z.size(channel_dim) == z.numel(), "z and indices differ in size");
  const c10::cuda::CUDAGuard guard(z.device());
  at::Tensor counts = at::empty({num_embeddings}, indices.options());
  at::Tensor sums = at::empty({num_embeddings, z.size(channel_dim)}, z.options().dtype(at::kFloat));
  SumByCodeArguments sum{};
  sum.share = 1.0f;
  sum.counts = counts.mutable_data_ptr<int64_t>();
  sum_by_code(z, channel_dim, indices, sum, sums, c10::cuda::getCurrentCUDAStream());
  return {counts, sums};
}

}  // namespace fastldm::cuda

#endif
