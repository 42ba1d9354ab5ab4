// Launchers of the CUDA kernels, without torch: compiling them needs the CUDA toolkit alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "fastldm/code_lookup_device.h"

namespace fastldm::cuda {

// How a lookup is divided, and so the sizes of its scratch memory: O(N + K · D) in all.
struct ForwardPlan {
  ForwardPlan(int64_t num_latents, int64_t num_codes, int64_t depth, int processors);

  bool narrow;
  int64_t padded_codes, padded_depth, padded_latents;
  int pieces, pieces_of_split, splits;  // of the codebook: chunks or tiles
  int64_t prepare_blocks, screen_blocks, finish_blocks;
};

struct ForwardArguments {
  device::Latents z, z_q;
  void* z_q_data;
  const float* codebook;  // [num_codes, depth]
  int64_t num_latents, num_codes, depth;
  int64_t* indices;  // [num_latents]
  float* loss;       // one: the mean squared distance
  bool* holds_nan;   // [2]: z, codebook

  float* centre;             // [depth]
  float* codes;              // [padded_codes, narrow ? depth + 1 : padded_depth]
  float* minus_half_square;  // [padded_codes] where wide
  float* code_norms;         // [prepare_blocks]
  int32_t* code_nans;        // [prepare_blocks]
  float* scores;             // [2, splits, padded_latents]
  int32_t* chunks;           // [splits, padded_latents]
  double* losses;            // [finish_blocks]
  int32_t* latent_nans;      // [finish_blocks]
};

cudaError_t launch_forward(const ForwardPlan& plan, const ForwardArguments& call,
                           cudaStream_t stream);

struct GradLatentsArguments {
  device::Latents grad_z_q, z, grad_z;
  void* grad_z_data;
  const float* codebook;
  const int64_t* indices;
  const float* grad_loss;  // one
  float share;             // of an element in the mean, doubled
  int64_t num_latents, depth;
};

cudaError_t launch_grad_latents(const GradLatentsArguments& call, cudaStream_t stream);

// sums[k] = factor · share · Σ (z_n - origin[k]) over the latents n of code k.
struct SumByCodeArguments {
  device::Latents z;
  const int32_t* sorted;  // [num_latents] codes, ascending
  const int64_t* order;   // [num_latents] the latents that have them
  int64_t num_latents, num_codes, depth;
  const float* origin;  // [num_codes, depth], or null for zero
  const float* factor;  // one, or null for 1
  float share;
  float* sums;      // [num_codes, depth]
  int64_t* counts;  // [num_codes], or null
};

cudaError_t launch_sum_by_code(const SumByCodeArguments& call, cudaStream_t stream);

}  // namespace fastldm::cuda
