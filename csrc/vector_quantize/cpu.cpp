#include "vector_quantize/cpu.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector_quantize/nearest_codes.h"
#include "vector_quantize/positions.h"

namespace fastldm {
namespace {

// Work that is worth a task of its own.
constexpr double kNanosecondsPerTask = 5e4;
constexpr int64_t kElementsPerTask = 1 << 14;

int64_t elements_grain(int64_t count, int64_t elements) {
  return std::max<int64_t>(1, kElementsPerTask * count / std::max<int64_t>(1, elements));
}

template <typename T>
bool holds_nan(const T* values, int64_t count) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= values[i] != values[i];
  return found;
}

// One tile at a time: gather, search, scatter. Each tile has its own place in `loss_of_tile`, so
// the result does not depend on which thread did it. Returns whether z holds NaN.
template <typename Z, typename T>
bool quantize_tiles(const at::Tensor& z, const at::Tensor& codebook, int64_t channel_dim,
                    at::Tensor& z_q, at::Tensor& indices, std::vector<double>& loss_of_tile) {
  const int64_t depth = codebook.size(1), num_latents = indices.numel();
  const Positions from(z, channel_dim), to(z_q, channel_dim);
  const Z* z_data = z.const_data_ptr<Z>();
  const T* codes = codebook.const_data_ptr<T>();
  Z* z_q_data = z_q.mutable_data_ptr<Z>();
  int64_t* index_data = indices.mutable_data_ptr<int64_t>();
  const NearestCodes<T> nearest(codes, codebook.size(0), depth, num_latents);
  std::atomic<bool> found_nan{false};

  const int64_t grain =
      std::max<int64_t>(1, static_cast<int64_t>(kNanosecondsPerTask / (kTile * nearest.cost())));
  at::parallel_for(0, loss_of_tile.size(), grain, [&](int64_t begin, int64_t end) {
    std::vector<T> latents(depth * kTile), chosen(depth * kTile), scratch;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile;
      const int64_t count = std::min<int64_t>(kTile, num_latents - first);
      from.for_each_element(first, count, depth, [&](int64_t p, int64_t d, int64_t at) {
        latents[d * kTile + p] = static_cast<T>(z_data[at]);
      });
      if (holds_nan(latents.data(), depth * kTile)) {
        found_nan = true;
        return;
      }
      nearest.find(latents.data(), count, scratch, index_data + first);
      const int64_t* index = index_data + first;
      for_each_in_blocks(count, depth, [&](int64_t p, int64_t d) {
        chosen[d * kTile + p] = codes[index[p] * depth + d];
      });
      T distances[kTile] = {};
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t p = 0; p < count; ++p) {
          const T difference = latents[d * kTile + p] - chosen[d * kTile + p];
          distances[p] += difference * difference;
        }
      }
      to.for_each_element(first, count, depth, [&](int64_t p, int64_t d, int64_t at) {
        z_q_data[at] = static_cast<Z>(chosen[d * kTile + p]);
      });
      double loss = 0;
      for (int64_t p = 0; p < count; ++p) loss += distances[p];
      loss_of_tile[tile] = loss;
    }
  });
  return found_nan;
}

// How many latents have each code.
at::Tensor count_codes(const at::Tensor& indices, int64_t num_codes) {
  const at::Tensor counts = at::zeros({num_codes}, indices.options());
  int64_t* counted = counts.mutable_data_ptr<int64_t>();
  const int64_t* index = indices.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < indices.numel(); ++n) {
    TORCH_CHECK_INDEX(0 <= index[n] && index[n] < num_codes, "indices: got ", index[n],
                      "; accepted: 0 to ", num_codes - 1);
    ++counted[index[n]];
  }
  return counts;
}

// The codes that occur, often few of many, and the place of each among them.
struct OccurringCodes {
  std::vector<int32_t> codes, place;  // place: [K]; any number for a code that does not occur

  explicit OccurringCodes(const at::Tensor& counts) : codes(counts.numel()), place(counts.numel()) {
    const int64_t* counted = counts.const_data_ptr<int64_t>();
    int32_t found = 0;
    // Without a branch, which would be mispredicted for every code that occurs.
    for (int64_t k = 0; k < counts.numel(); ++k) {
      place[k] = found;
      codes[found] = static_cast<int32_t>(k);
      found += counted[k] > 0;
    }
    codes.resize(found);
  }
};

// sums[k] = factor · Σ (z_n - origin(k)) over the latents n of code k, accumulated in double. A
// channel belongs to one thread, which adds in the order of the latents.
template <typename Z, typename T, typename Origin>
void sum_by_code(const at::Tensor& z, int64_t channel_dim, const at::Tensor& indices,
                 const at::Tensor& counts, double factor, Origin origin, at::Tensor& sums) {
  constexpr int64_t kChannels = 8;
  const int64_t depth = sums.size(1), num_latents = indices.numel();
  const OccurringCodes occurring(counts);
  const int64_t num_occurring = static_cast<int64_t>(occurring.codes.size());
  sums.zero_();
  const Positions at_z(z, channel_dim);
  const Z* z_data = z.const_data_ptr<Z>();
  const int64_t* index = indices.const_data_ptr<int64_t>();
  T* sums_data = sums.mutable_data_ptr<T>();
  at::parallel_for(0, depth, elements_grain(depth, z.numel()), [&](int64_t begin, int64_t end) {
    std::vector<double> sum(num_occurring * std::min(kChannels, end - begin));
    for (int64_t first = begin; first < end; first += kChannels) {
      const int64_t width = std::min(kChannels, end - first);
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t tile = 0; tile < num_latents; tile += kTile) {
        const int64_t count = std::min<int64_t>(kTile, num_latents - tile);
        int64_t place[kTile];
        at_z.offsets(tile, count, place);
        for (int64_t p = 0; p < count; ++p) {
          const int64_t k = index[tile + p];
          const Z* from = z_data + place[p] + first * at_z.channel_stride;
          double* to = sum.data() + occurring.place[k] * width;
          for (int64_t i = 0; i < width; ++i) {
            to[i] += static_cast<double>(from[i * at_z.channel_stride]) - origin(k, first + i);
          }
        }
      }
      for (int64_t j = 0; j < num_occurring; ++j)
        for (int64_t i = 0; i < width; ++i)
          sums_data[int64_t{occurring.codes[j]} * depth + first + i] =
              static_cast<T>(factor * sum[j * width + i]);
    }
  });
}

template <typename Z, typename T>
void gradients(const at::Tensor& grad_z_q, double grad_codebook_loss, double grad_commitment_loss,
               const at::Tensor& z, const at::Tensor& codebook, const at::Tensor& indices,
               int64_t channel_dim, at::Tensor& grad_z, at::Tensor& grad_codebook) {
  const int64_t depth = codebook.size(1), num_latents = indices.numel();
  const double share = num_latents == 0 ? 0.0 : 2.0 / static_cast<double>(z.numel());
  const T to_latent = static_cast<T>(grad_commitment_loss * share);
  const Positions at_z(z, channel_dim), at_grad(grad_z_q, channel_dim), to(grad_z, channel_dim);
  const Z* z_data = z.const_data_ptr<Z>();
  const Z* grad_data = grad_z_q.const_data_ptr<Z>();
  const T* codes = codebook.const_data_ptr<T>();
  const int64_t* index_data = indices.const_data_ptr<int64_t>();
  Z* grad_z_data = grad_z.mutable_data_ptr<Z>();

  // Checks the indices, too, before they are used.
  const at::Tensor counts = count_codes(indices, codebook.size(0));
  const auto grain = elements_grain(num_latents, z.numel());
  at::parallel_for(0, num_latents, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min<int64_t>(kTile, end - first);
      int64_t place_of_z[kTile], place_of_grad[kTile], place[kTile];
      at_z.offsets(first, count, place_of_z);
      at_grad.offsets(first, count, place_of_grad);
      to.offsets(first, count, place);
      for_each_in_blocks(count, depth, [&](int64_t p, int64_t d) {
        const T difference = static_cast<T>(z_data[place_of_z[p] + d * at_z.channel_stride]) -
                             codes[index_data[first + p] * depth + d];
        const T grad = static_cast<T>(grad_data[place_of_grad[p] + d * at_grad.channel_stride]);
        grad_z_data[place[p] + d * to.channel_stride] =
            static_cast<Z>(grad + to_latent * difference);
      });
    }
  });
  sum_by_code<Z, T>(
      z, channel_dim, indices, counts, -grad_codebook_loss * share,
      [&](int64_t k, int64_t d) { return static_cast<double>(codes[k * depth + d]); },
      grad_codebook);
}

void check(const at::Tensor& z, const at::Tensor& codebook, int64_t channel_dim) {
  TORCH_CHECK(z.device().is_cpu() && codebook.device().is_cpu(), "expected CPU tensors");
  TORCH_CHECK(codebook.dim() == 2 && codebook.is_contiguous() && codebook.size(0) > 0,
              "codebook: expected a contiguous [K, D]");
  TORCH_CHECK(codebook.size(0) <= std::numeric_limits<int32_t>::max(), "codebook: too many codes");
  TORCH_CHECK(0 <= channel_dim && channel_dim < z.dim(), "channel_dim: out of range");
  TORCH_CHECK(z.size(channel_dim) == codebook.size(1), "z and codebook differ in D");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::string> vector_quantize_fwd(
    const at::Tensor& z, const at::Tensor& codebook, int64_t channel_dim) {
  check(z, codebook, channel_dim);
  at::Tensor z_q = at::empty_like(z);
  std::vector<int64_t> shape = z.sizes().vec();
  shape.erase(shape.begin() + channel_dim);
  at::Tensor indices = at::empty(shape, z.options().dtype(at::kLong));
  std::vector<double> loss_of_tile((indices.numel() + kTile - 1) / kTile);
  const bool is_double = codebook.scalar_type() == at::kDouble;
  std::string nan_in;
  if (is_double ? holds_nan(codebook.const_data_ptr<double>(), codebook.numel())
                : holds_nan(codebook.const_data_ptr<float>(), codebook.numel()))
    return {z_q, indices, at::empty({}, codebook.options()), "codebook"};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, z.scalar_type(), "vector_quantize_fwd", [&] {
        const bool has_nan = is_double ? quantize_tiles<scalar_t, double>(
                                             z, codebook, channel_dim, z_q, indices, loss_of_tile)
                                       : quantize_tiles<scalar_t, float>(
                                             z, codebook, channel_dim, z_q, indices, loss_of_tile);
        if (has_nan) nan_in = "z";
      });
  double sum = 0;
  for (const double loss : loss_of_tile) sum += loss;
  const at::Tensor mean =
      at::scalar_tensor(sum / static_cast<double>(z.numel()), codebook.options());
  return {z_q, indices, mean, nan_in};
}

std::tuple<at::Tensor, at::Tensor> vector_quantize_bwd(
    const at::Tensor& grad_z_q, double grad_codebook_loss, double grad_commitment_loss,
    const at::Tensor& z, const at::Tensor& codebook, const at::Tensor& indices,
    int64_t channel_dim) {
  check(z, codebook, channel_dim);
  TORCH_CHECK(grad_z_q.sizes() == z.sizes() && grad_z_q.scalar_type() == z.scalar_type(),
              "grad_z_q: expected the shape and dtype of z");
  const at::Tensor dense_indices = indices.contiguous();
  at::Tensor grad_z = at::empty_like(z);
  at::Tensor grad_codebook = at::empty_like(codebook);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, z.scalar_type(), "vector_quantize_bwd", [&] {
        if (codebook.scalar_type() == at::kDouble) {
          gradients<scalar_t, double>(grad_z_q, grad_codebook_loss, grad_commitment_loss, z,
                                      codebook, dense_indices, channel_dim, grad_z, grad_codebook);
        } else {
          gradients<scalar_t, float>(grad_z_q, grad_codebook_loss, grad_commitment_loss, z,
                                     codebook, dense_indices, channel_dim, grad_z, grad_codebook);
        }
      });
  return {grad_z, grad_codebook};
}

std::tuple<at::Tensor, at::Tensor> codebook_statistics(const at::Tensor& z,
                                                       const at::Tensor& indices,
                                                       int64_t num_embeddings,
                                                       int64_t channel_dim) {
  TORCH_CHECK(z.device().is_cpu() && indices.device().is_cpu(), "expected CPU tensors");
  TORCH_CHECK(indices.numel() * z.size(channel_dim) == z.numel(), "z and indices differ in size");
  const bool is_double = z.scalar_type() == at::kDouble;
  const at::Tensor dense_indices = indices.contiguous();
  const at::Tensor counts = count_codes(dense_indices, num_embeddings);
  at::Tensor sums = at::empty({num_embeddings, z.size(channel_dim)},
                              z.options().dtype(is_double ? at::kDouble : at::kFloat));
  const auto zero = [](int64_t, int64_t) { return 0.0; };
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, z.scalar_type(), "codebook_statistics", [&] {
        if (is_double) {
          sum_by_code<scalar_t, double>(z, channel_dim, dense_indices, counts, 1.0, zero, sums);
        } else {
          sum_by_code<scalar_t, float>(z, channel_dim, dense_indices, counts, 1.0, zero, sums);
        }
      });
  return {counts, sums};
}

}  // namespace fastldm
