// The CUDA lookup thread by thread on the CPU, with the grid and blocks of csrc/vector_quantize/
// cuda.cu as plain loops.
#include <algorithm>
#include <vector>

#include "fastldm/code_lookup_device.h"

using namespace fastldm;
using namespace fastldm::device;

namespace {

struct Problem {
  Latents latents;
  int64_t num_latents;
  const float* codebook;
  int64_t num_codes, depth, padded_codes;
  std::vector<float> centre;
};

template <int D>
void screen_narrow(const Problem& p, const std::vector<Float4>& codes, int pieces,
                   std::vector<TopTwo>& scores) {
  if constexpr (D > 1) {
    if (p.depth < D) return screen_narrow<D - 1>(p, codes, pieces, scores);
  }
  for (int64_t first = 0; first < p.num_latents; first += kRun) {
    NarrowScreen<D> screen;
    screen.begin(p.latents, p.centre.data(), first, p.num_latents);
    for (int chunk = 0; chunk < pieces; ++chunk)
      screen.add_chunk(codes.data() + int64_t{chunk} * NarrowScreen<D>::kVectors, chunk);
    for (int i = 0; i < kRun && first + i < p.num_latents; ++i)
      scores[first + i].merge(screen.scores[i]);
  }
}

void screen_wide(const Problem& p, const std::vector<Float4>& codes,
                 const std::vector<float>& minus_half_square, int64_t padded_depth,
                 std::vector<TopTwo>& scores) {
  const float* codes_data = reinterpret_cast<const float*>(codes.data());
  std::vector<WideScreen> threads(kWideThreads);
  alignas(16) static WideScreen::Part latents_part, codes_part;
  for (int64_t first = 0; first < p.num_latents; first += kWideTile) {
    for (int t = 0; t < kWideThreads; ++t) threads[t].begin(p.latents, p.num_latents, first, t);
    for (int tile = 0; tile < p.padded_codes / kWideTile; ++tile) {
      const int64_t first_code = int64_t{tile} * kWideTile;
      for (auto& thread : threads) thread.clear();
      for (int64_t d = 0; d < padded_depth; d += kWideStep) {
        for (int t = 0; t < kWideThreads; ++t) {
          threads[t].load(p.latents, p.centre.data(), p.depth, p.num_latents, codes_data,
                          p.padded_codes, first_code, d, t);
          threads[t].store(p.latents.access, latents_part, codes_part, t);
        }
        for (int t = 0; t < kWideThreads; ++t)
          threads[t].multiply(latents_part, codes_part, t % 16, t / 16);
      }
      for (int t = 0; t < kWideThreads; ++t) {
        for (int i = 0; i < 8; ++i) {
          const int64_t n = first + wide_place(t / 16, i);
          if (n < p.num_latents)
            scores[n].add(threads[t].most(i, minus_half_square.data(), first_code, t % 16),
                          tile * 16 + t % 16);
        }
      }
    }
  }
}

}  // namespace

// sizes, strides: of `dims` dimensions, without the channels'. Returns how many latents had to be
// searched exhaustively.
extern "C" int64_t lookup(const void* z, int dtype, int access, int dims, const int64_t* sizes,
                          const int64_t* strides, int64_t channel_stride, const float* codebook,
                          int64_t num_codes, int64_t depth, int64_t* indices) {
  Problem p{};
  p.latents.data = z;
  p.latents.dtype = static_cast<Dtype>(dtype);
  p.latents.access = static_cast<Access>(access);
  p.latents.dims = dims;
  p.num_latents = 1;
  for (int i = 0; i < dims; ++i) {
    p.latents.sizes[i] = sizes[i];
    p.latents.strides[i] = strides[i];
    p.num_latents *= sizes[i];
  }
  p.latents.channel_stride = channel_stride;
  p.codebook = codebook;
  p.num_codes = num_codes;
  p.depth = depth;
  p.padded_codes = (num_codes + 127) / 128 * 128;
  for (int64_t d = 0; d < depth; ++d)
    p.centre.push_back(screen_centre(codebook, num_codes, depth, d));

  const bool narrow = depth <= kMaxNarrow;
  const int64_t padded_depth = (depth + kWideStep - 1) / kWideStep * kWideStep;
  std::vector<Float4> codes(p.padded_codes * (narrow ? depth + 1 : padded_depth) / 4);
  std::vector<float> minus_half_square(p.padded_codes, -kInfinity);
  float* codes_data = reinterpret_cast<float*>(codes.data());
  CodeNorm all;
  for (int64_t k = 0; k < p.padded_codes; ++k) {
    CodeNorm found;
    if (narrow) {
      found = lay_out_narrow(codebook, num_codes, depth, p.centre.data(), k, codes_data);
    } else {
      float square = 0;
      for (int64_t d = 0; d < padded_depth; ++d) {
        const float value = lay_out_wide(codebook, num_codes, depth, p.padded_codes,
                                         p.centre.data(), k, d, codes_data, found.has_nan);
        square = std::fma(value, value, square);
      }
      if (k < num_codes) minus_half_square[k] = -0.5f * square;
      found.norm = code_norm_bound(square, depth);
    }
    all.norm = std::fmax(all.norm, found.norm);
    all.has_nan |= found.has_nan;
  }
  std::vector<TopTwo> scores(p.num_latents);
  if (narrow) {
    screen_narrow<kMaxNarrow>(p, codes, static_cast<int>(p.padded_codes / kNarrowChunk), scores);
  } else {
    screen_wide(p, codes, minus_half_square, padded_depth, scores);
  }
  const Finish finish{p.latents, codebook, p.centre.data(), num_codes, depth, narrow};
  int64_t open = 0;
  for (int64_t n = 0; n < p.num_latents; ++n) {
    const int64_t place = p.latents.offset(n);
    Nearest nearest;
    if (!all.has_nan && is_decided(scores[n], finish.norm(place), all.norm, depth)) {
      nearest = finish.of_chunk(place, scores[n].chunk);
    } else if (!all.has_nan) {
      ++open;
      for (int lane = 0; lane < 32; ++lane) {
        const Nearest part = finish.of_all(place, lane, 32);
        nearest.add(part.distance, part.index);
      }
    }
    indices[n] = nearest.index;
  }
  return open;
}
