// The nearest-codebook lookup on CUDA. The codes are centred and laid out for the kernel that
// scores them (narrow latents: codes in shared memory, latents in registers; wide ones: a tiled
// matrix product), blocks score parts of the codebook, and the last kernel measures the few codes
// that can be nearest; see code_lookup_device.h.
#include <algorithm>

#include "vector_quantize/cuda_kernels.h"

namespace fastldm::cuda {
namespace {

using device::Finish;
using device::Float4;
using device::Latents;
using device::Nearest;
using device::TopTwo;

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
// Chunks of codes in shared memory at once.
constexpr int kNarrowTile = 8;

// What each part of the codebook found for each latent: [splits, padded latents].
struct Scores {
  float* top;
  float* second;
  int32_t* chunk;
  int64_t padded_latents;
  int splits;
};

// What each block of the preparation found.
struct CodeNorms {
  float* largest;
  int32_t* holds_nan;
  int count;
};

template <int kCount, typename T, typename Combine>
__device__ T reduce_block(T value, Combine combine) {
  __shared__ T of_warp[kCount / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
  for (int warp = 1; warp < kCount / kWarp; ++warp) value = combine(value, of_warp[warp]);
  return value;
}

__device__ float larger(float a, float b) { return fmaxf(a, b); }

__global__ void centre_kernel(const float* codebook, int64_t num_codes, int64_t depth,
                              float* centre) {
  const int64_t d = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (d < depth) centre[d] = screen_centre(codebook, num_codes, depth, d);
}

__device__ void store_norms(const device::CodeNorm& found, CodeNorms norms) {
  const float largest = reduce_block<kThreads>(found.norm, larger);
  const bool any_nan = __syncthreads_or(found.has_nan);
  if (threadIdx.x == 0) {
    norms.largest[blockIdx.x] = largest;
    norms.holds_nan[blockIdx.x] = any_nan;
  }
}

// One code a thread.
__global__ void prepare_narrow_kernel(const float* codebook, int64_t num_codes, int64_t depth,
                                      const float* centre, float* codes, CodeNorms norms) {
  const int64_t k = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  store_norms(device::lay_out_narrow(codebook, num_codes, depth, centre, k, codes), norms);
}

// One code a warp.
__global__ void prepare_wide_kernel(const float* codebook, int64_t num_codes, int64_t depth,
                                    int64_t padded_depth, int64_t padded_codes, const float* centre,
                                    float* codes, float* minus_half_square, CodeNorms norms) {
  const int lane = threadIdx.x % kWarp;
  const int64_t k = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarp;
  device::CodeNorm found;
  float square = 0;
  for (int64_t d = lane; d < padded_depth; d += kWarp) {
    const float value = device::lay_out_wide(codebook, num_codes, depth, padded_codes, centre, k, d,
                                             codes, found.has_nan);
    square = fmaf(value, value, square);
  }
  for (int step = kWarp / 2; step > 0; step /= 2)
    square += __shfl_xor_sync(kAllLanes, square, step);
  if (lane == 0) minus_half_square[k] = k < num_codes ? -0.5f * square : -device::kInfinity;
  found.norm = device::code_norm_bound(square, depth);
  store_norms(found, norms);
}

template <int D>
__global__ void __launch_bounds__(kThreads)
    screen_narrow_kernel(Latents latents, int64_t num_latents, const float* centre,
                         const Float4* codes, int chunks, int chunks_of_split, Scores scores) {
  using Screen = device::NarrowScreen<D>;
  __shared__ Float4 tile[kNarrowTile * Screen::kVectors];
  const int64_t first = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * device::kRun;
  Screen screen;
  screen.begin(latents, centre, first < num_latents ? first : num_latents - 1, num_latents);
  const int begin = blockIdx.y * chunks_of_split, end = min(begin + chunks_of_split, chunks);
  for (int chunk = begin; chunk < end; chunk += kNarrowTile) {
    const int count = min(kNarrowTile, end - chunk);
    __syncthreads();
    for (int i = threadIdx.x; i < count * Screen::kVectors; i += kThreads)
      tile[i] = codes[int64_t{chunk} * Screen::kVectors + i];
    __syncthreads();
    for (int i = 0; i < count; ++i) screen.add_chunk(tile + i * Screen::kVectors, chunk + i);
  }
  if (first >= num_latents) return;
  const int64_t at = blockIdx.y * scores.padded_latents + first;
#pragma unroll
  for (int i = 0; i < device::kRun; i += 4) {
    Float4 top, second;
    int4 chunk;
    int32_t chunk_of[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      top.value[j] = screen.scores[i + j].top;
      second.value[j] = screen.scores[i + j].second;
      chunk_of[j] = screen.scores[i + j].chunk;
    }
    chunk = make_int4(chunk_of[0], chunk_of[1], chunk_of[2], chunk_of[3]);
    *reinterpret_cast<Float4*>(scores.top + at + i) = top;
    *reinterpret_cast<Float4*>(scores.second + at + i) = second;
    *reinterpret_cast<int4*>(scores.chunk + at + i) = chunk;
  }
}

__global__ void __launch_bounds__(device::kWideThreads, 1)
    screen_wide_kernel(Latents latents, int64_t num_latents, const float* centre, int64_t depth,
                       int64_t padded_depth, const float* codes, const float* minus_half_square,
                       int64_t padded_codes, int tiles, int tiles_of_split, Scores scores) {
  using device::kWideStep;
  using device::kWideTile;
  __shared__ __align__(16) device::WideScreen::Part latents_part[2], codes_part[2];
  const int thread = threadIdx.x, x = thread % 16, y = thread / 16;
  const int64_t first_latent = blockIdx.x * int64_t{kWideTile};
  device::WideScreen screen;
  screen.begin(latents, num_latents, first_latent, thread);
  const int begin = blockIdx.y * tiles_of_split, end = min(begin + tiles_of_split, tiles);
  for (int tile = begin; tile < end; ++tile) {
    const int64_t first_code = int64_t{tile} * kWideTile;
    screen.clear();
    screen.load(latents, centre, depth, num_latents, codes, padded_codes, first_code, 0, thread);
    int part = 0;
    for (int64_t d = 0; d < padded_depth; d += kWideStep, part ^= 1) {
      screen.store(latents.access, latents_part[part], codes_part[part], thread);
      // One barrier a step: while a part is read, the other is written.
      __syncthreads();
      if (d + kWideStep < padded_depth)
        screen.load(latents, centre, depth, num_latents, codes, padded_codes, first_code,
                    d + kWideStep, thread);
      screen.multiply(latents_part[part], codes_part[part], x, y);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      TopTwo found;
      found.top = screen.most(i, minus_half_square, first_code, x);
      found.chunk = tile * 16 + x;
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        TopTwo other;
        other.top = __shfl_xor_sync(kAllLanes, found.top, step);
        other.second = __shfl_xor_sync(kAllLanes, found.second, step);
        other.chunk = __shfl_xor_sync(kAllLanes, found.chunk, step);
        found.merge(other);
      }
      screen.scores[i].merge(found);
    }
    // The first store of the next tile is to the part that other warps may still read.
    __syncthreads();
  }
  if (x != 0) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t n = first_latent + device::wide_place(y, i);
    if (n >= num_latents) continue;
    const int64_t at = blockIdx.y * scores.padded_latents + n;
    scores.top[at] = screen.scores[i].top;
    scores.second[at] = screen.scores[i].second;
    scores.chunk[at] = screen.scores[i].chunk;
  }
}

template <typename Z>
__device__ Z narrow_to(float value);
template <>
__device__ float narrow_to<float>(float value) {
  return value;
}
template <>
__device__ __half narrow_to<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __nv_bfloat16 narrow_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename Z>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Finish finish, int64_t num_latents, Scores scores, CodeNorms norms, Latents to,
                  Z* z_q, int64_t* indices, double* losses, int32_t* z_holds_nan) {
  float code_norm = 0;
  bool bad_codes = false;
  for (int i = threadIdx.x; i < norms.count; i += kThreads) {
    code_norm = fmaxf(code_norm, norms.largest[i]);
    bad_codes |= norms.holds_nan[i] != 0;
  }
  code_norm = reduce_block<kThreads>(code_norm, larger);
  bad_codes = __syncthreads_or(bad_codes);

  const int64_t n = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const bool active = n < num_latents;
  const int64_t place = active ? finish.latents.offset(n) : 0;
  TopTwo found;
  bool decided = true;
  Nearest nearest;
  if (active && !bad_codes) {
    for (int split = 0; split < scores.splits; ++split) {
      const int64_t at = split * scores.padded_latents + n;
      TopTwo part;
      part.top = scores.top[at];
      part.second = scores.second[at];
      part.chunk = scores.chunk[at];
      found.merge(part);
    }
    decided = device::is_decided(found, finish.norm(place), code_norm, finish.depth);
    if (decided) nearest = finish.of_chunk(place, found.chunk);
  }
  // The others, one after another, by all threads of the warp.
  const int lane = threadIdx.x % kWarp;
  for (unsigned open = __ballot_sync(kAllLanes, !decided); open != 0; open &= open - 1) {
    const int owner = __ffs(open) - 1;
    Nearest part = finish.of_all(__shfl_sync(kAllLanes, place, owner), lane, kWarp);
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float distance = __shfl_xor_sync(kAllLanes, part.distance, step);
      const int32_t index = __shfl_xor_sync(kAllLanes, part.index, step);
      part.add(distance, index);
    }
    if (lane == owner) nearest = part;
  }

  float loss = 0;
  bool has_nan = false;
  if (active) {
    indices[n] = nearest.index;
    const int64_t target = to.offset(n);
    const float* code = finish.codebook + nearest.index * finish.depth;
    for (int64_t d = 0; d < finish.depth; ++d) {
      const float value = finish.latents.load(place + d * finish.latents.channel_stride);
      has_nan |= value != value;
      loss = device::add_square(value, code[d], loss);
      z_q[target + d * to.channel_stride] = narrow_to<Z>(code[d]);
    }
  }
  const double sum =
      reduce_block<kThreads>(static_cast<double>(loss), [](double a, double b) { return a + b; });
  has_nan = __syncthreads_or(has_nan);
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = sum;
    z_holds_nan[blockIdx.x] = has_nan;
  }
}

// One block: the mean loss, and whether [z, codebook] hold NaN.
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const double* losses, const int32_t* z_holds_nan, int64_t count, CodeNorms norms,
                  double elements, float* loss, bool* holds_nan) {
  double sum = 0;
  bool bad_latents = false, bad_codes = false;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += losses[i];
    bad_latents |= z_holds_nan[i] != 0;
  }
  for (int i = threadIdx.x; i < norms.count; i += kThreads) bad_codes |= norms.holds_nan[i] != 0;
  sum = reduce_block<kThreads>(sum, [](double a, double b) { return a + b; });
  bad_latents = __syncthreads_or(bad_latents);
  bad_codes = __syncthreads_or(bad_codes);
  if (threadIdx.x == 0) {
    *loss = bad_codes ? NAN : static_cast<float>(sum / elements);
    holds_nan[0] = bad_latents;
    holds_nan[1] = bad_codes;
  }
}

template <int D = device::kMaxNarrow>
void launch_screen_narrow(const ForwardPlan& plan, const ForwardArguments& call, dim3 grid,
                          const Scores& scores, cudaStream_t stream) {
  if constexpr (D > 1) {
    if (call.depth < D) return launch_screen_narrow<D - 1>(plan, call, grid, scores, stream);
  }
  screen_narrow_kernel<D><<<grid, kThreads, 0, stream>>>(
      call.z, call.num_latents, call.centre, reinterpret_cast<const Float4*>(call.codes),
      plan.pieces, plan.pieces_of_split, scores);
}

template <typename Z>
void launch_finish(const ForwardPlan& plan, const ForwardArguments& call, const Scores& scores,
                   const CodeNorms& norms, cudaStream_t stream) {
  const Finish finish{call.z, call.codebook, call.centre, call.num_codes, call.depth, plan.narrow};
  finish_kernel<Z><<<plan.finish_blocks, kThreads, 0, stream>>>(
      finish, call.num_latents, scores, norms, call.z_q, static_cast<Z*>(call.z_q_data),
      call.indices, call.losses, call.latent_nans);
}

int64_t blocks_for(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

}  // namespace

ForwardPlan::ForwardPlan(int64_t num_latents, int64_t num_codes, int64_t depth, int processors)
    : narrow(depth <= device::kMaxNarrow) {
  padded_codes = blocks_for(num_codes, kThreads) * kThreads;
  padded_depth = blocks_for(depth, device::kWideStep) * device::kWideStep;
  padded_latents = blocks_for(num_latents, device::kRun) * device::kRun;
  pieces = static_cast<int>(padded_codes / (narrow ? device::kNarrowChunk : device::kWideTile));
  screen_blocks = blocks_for(num_latents, narrow ? kThreads * device::kRun : device::kWideTile);
  // So that the blocks of all parts fill the GPU with four on each multiprocessor.
  const int64_t wanted = blocks_for(int64_t{4} * processors, std::max<int64_t>(1, screen_blocks));
  pieces_of_split = static_cast<int>(blocks_for(pieces, std::min<int64_t>(wanted, pieces)));
  splits = static_cast<int>(blocks_for(pieces, pieces_of_split));
  prepare_blocks = narrow ? padded_codes / kThreads : padded_codes / (kThreads / kWarp);
  finish_blocks = blocks_for(num_latents, kThreads);
}

cudaError_t launch_forward(const ForwardPlan& plan, const ForwardArguments& call,
                           cudaStream_t stream) {
  const CodeNorms norms{call.code_norms, call.code_nans, static_cast<int>(plan.prepare_blocks)};
  const int64_t scored = plan.splits * plan.padded_latents;
  const Scores scores{call.scores, call.scores + scored, call.chunks, plan.padded_latents,
                      plan.splits};
  const dim3 grid(static_cast<unsigned>(plan.screen_blocks), static_cast<unsigned>(plan.splits));
  centre_kernel<<<blocks_for(call.depth, kThreads), kThreads, 0, stream>>>(
      call.codebook, call.num_codes, call.depth, call.centre);
  if (plan.narrow) {
    prepare_narrow_kernel<<<plan.prepare_blocks, kThreads, 0, stream>>>(
        call.codebook, call.num_codes, call.depth, call.centre, call.codes, norms);
    if (call.num_latents > 0) launch_screen_narrow(plan, call, grid, scores, stream);
  } else {
    prepare_wide_kernel<<<plan.prepare_blocks, kThreads, 0, stream>>>(
        call.codebook, call.num_codes, call.depth, plan.padded_depth, plan.padded_codes,
        call.centre, call.codes, call.minus_half_square, norms);
    if (call.num_latents > 0) {
      screen_wide_kernel<<<grid, device::kWideThreads, 0, stream>>>(
          call.z, call.num_latents, call.centre, call.depth, plan.padded_depth, call.codes,
          call.minus_half_square, plan.padded_codes, plan.pieces, plan.pieces_of_split, scores);
    }
  }
  if (call.num_latents > 0) {
    const auto launch = call.z.dtype == device::Dtype::kFloat  ? launch_finish<float>
                        : call.z.dtype == device::Dtype::kHalf ? launch_finish<__half>
                                                               : launch_finish<__nv_bfloat16>;
    launch(plan, call, scores, norms, stream);
  }
  reduce_kernel<<<1, kThreads, 0, stream>>>(
      call.losses, call.latent_nans, plan.finish_blocks, norms,
      static_cast<double>(call.num_latents) * static_cast<double>(call.depth), call.loss,
      call.holds_nan);
  return cudaGetLastError();
}

}  // namespace fastldm::cuda
