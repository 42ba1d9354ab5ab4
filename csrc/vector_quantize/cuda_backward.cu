// Gradients and statistics of the lookup on CUDA. What is summed by code is summed by one block a
// code, over the latents sorted by code, in an order that hangs on nothing but their number.
#include "vector_quantize/cuda_kernels.h"

namespace fastldm::cuda {
namespace {

using device::Access;
using device::Latents;

constexpr int kThreads = 128;

int64_t blocks_for(int64_t count) { return (count + kThreads - 1) / kThreads; }

template <typename Z>
__device__ void store_run(Z* to, const float* values);

template <>
__device__ void store_run<float>(float* to, const float* values) {
  device::Float4 halves[2];
#pragma unroll
  for (int i = 0; i < device::kRun; ++i) halves[i / 4].value[i % 4] = values[i];
  reinterpret_cast<device::Float4*>(to)[0] = halves[0];
  reinterpret_cast<device::Float4*>(to)[1] = halves[1];
}

template <>
__device__ void store_run<__half>(__half* to, const float* values) {
  struct alignas(16) {
    __half value[device::kRun];
  } run;
#pragma unroll
  for (int i = 0; i < device::kRun; ++i) run.value[i] = __float2half_rn(values[i]);
  *reinterpret_cast<decltype(run)*>(to) = run;
}

template <>
__device__ void store_run<__nv_bfloat16>(__nv_bfloat16* to, const float* values) {
  struct alignas(16) {
    __nv_bfloat16 value[device::kRun];
  } run;
#pragma unroll
  for (int i = 0; i < device::kRun; ++i) run.value[i] = __float2bfloat16_rn(values[i]);
  *reinterpret_cast<decltype(run)*>(to) = run;
}

__device__ void store(float* to, float value) { *to = value; }
__device__ void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// grad_z = grad_z_q + grad_loss · share · (z - e). A thread has one channel of kRun latents.
template <typename Z>
__global__ void __launch_bounds__(kThreads)
    grad_latents_kernel(Latents grad_z_q, Latents z, Latents to, const float* codebook,
                        const int64_t* indices, const float* grad_loss, float share,
                        int64_t num_latents, int64_t depth, bool in_runs, Z* grad_z) {
  const int64_t runs = (num_latents + device::kRun - 1) / device::kRun;
  const int64_t item = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (item >= runs * depth) return;
  const int64_t d = item / runs, first = item % runs * device::kRun;
  const float scale = *grad_loss * share;
  if (in_runs) {
    float gradient[device::kRun], latent[device::kRun];
    grad_z_q.load_run(grad_z_q.offset(first) + d * grad_z_q.channel_stride, gradient);
    z.load_run(z.offset(first) + d * z.channel_stride, latent);
#pragma unroll
    for (int i = 0; i < device::kRun; ++i)
      gradient[i] += scale * (latent[i] - codebook[indices[first + i] * depth + d]);
    store_run(grad_z + to.offset(first) + d * to.channel_stride, gradient);
    return;
  }
  for (int64_t n = first; n < first + device::kRun && n < num_latents; ++n) {
    const float difference =
        z.load(z.offset(n) + d * z.channel_stride) - codebook[indices[n] * depth + d];
    const float gradient = grad_z_q.load(grad_z_q.offset(n) + d * grad_z_q.channel_stride);
    store(grad_z + to.offset(n) + d * to.channel_stride, gradient + scale * difference);
  }
}

// The first place in ascending `values` that is not below `bound`.
__device__ int64_t first_at_least(const int32_t* values, int64_t count, int32_t bound) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] < bound) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// sums[k] = factor · Σ (z_n - origin[k]) over the latents n of code k, by one block: `rows` of its
// threads share a channel and each takes every rows-th latent.
__global__ void __launch_bounds__(kThreads)
    sum_by_code_kernel(Latents z, const int32_t* sorted, const int64_t* order, int64_t num_latents,
                       int64_t depth, int rows, const float* origin, const float* factor,
                       float share, float* sums, int64_t* counts) {
  __shared__ float partial[kThreads];
  const int32_t k = static_cast<int32_t>(blockIdx.x);
  const int64_t begin = first_at_least(sorted, num_latents, k);
  const int64_t end = first_at_least(sorted, num_latents, k + 1);
  if (counts != nullptr && threadIdx.x == 0) counts[k] = end - begin;
  const int channels = kThreads / rows, row = threadIdx.x / channels;
  const float scale = factor == nullptr ? 1.0f : *factor * share;
  for (int64_t block = 0; block < depth; block += channels) {
    const int64_t d = block + threadIdx.x % channels;
    float sum = 0;
    if (d < depth) {
      const float from = origin == nullptr ? 0.0f : origin[k * depth + d];
      for (int64_t i = begin + row; i < end; i += rows)
        sum += z.load(z.offset(order[i]) + d * z.channel_stride) - from;
    }
    partial[threadIdx.x] = sum;
    for (int half = rows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (row < half) partial[threadIdx.x] += partial[threadIdx.x + half * channels];
    }
    if (row == 0 && d < depth) sums[k * depth + d] = scale * partial[threadIdx.x];
    __syncthreads();
  }
}

template <typename Z>
void launch_grad_latents_of(const GradLatentsArguments& call, cudaStream_t stream) {
  const int64_t runs = (call.num_latents + device::kRun - 1) / device::kRun;
  const bool in_runs = call.grad_z_q.access == Access::kAlongLatents &&
                       call.z.access == Access::kAlongLatents &&
                       call.grad_z.access == Access::kAlongLatents;
  grad_latents_kernel<Z><<<blocks_for(runs * call.depth), kThreads, 0, stream>>>(
      call.grad_z_q, call.z, call.grad_z, call.codebook, call.indices, call.grad_loss, call.share,
      call.num_latents, call.depth, in_runs, static_cast<Z*>(call.grad_z_data));
}

}  // namespace

cudaError_t launch_grad_latents(const GradLatentsArguments& call, cudaStream_t stream) {
  const auto launch = call.z.dtype == device::Dtype::kFloat ? launch_grad_latents_of<float>
                      : call.z.dtype == device::Dtype::kHalf
                          ? launch_grad_latents_of<__half>
                          : launch_grad_latents_of<__nv_bfloat16>;
  if (call.num_latents > 0) launch(call, stream);
  return cudaGetLastError();
}

cudaError_t launch_sum_by_code(const SumByCodeArguments& call, cudaStream_t stream) {
  int rows = kThreads;
  while (rows > 1 && kThreads / rows < call.depth) rows /= 2;
  sum_by_code_kernel<<<call.num_codes, kThreads, 0, stream>>>(
      call.z, call.sorted, call.order, call.num_latents, call.depth, rows, call.origin, call.factor,
      call.share, call.sums, call.counts);
  return cudaGetLastError();
}

}  // namespace fastldm::cuda
