#include "cpu.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "fastldm/multiversion.h"
#include "fastldm/nearest_code.h"

namespace fastldm {
namespace {

// Distances that are worth a task of their own.
constexpr int64_t kDistancesPerTask = 1 << 16;
// Elements of a gradient that are.
constexpr int64_t kElementsPerTask = 1 << 14;

template <typename T>
using IndexOf = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

FASTLDM_MULTIVERSION
void nearest_codes(const float* latents, const float* codebook, int64_t num_codes, int64_t depth,
                   float* best, int32_t* index) {
  nearest_codes_of_tile(latents, codebook, num_codes, depth, best, index);
}

FASTLDM_MULTIVERSION
void nearest_codes(const double* latents, const double* codebook, int64_t num_codes, int64_t depth,
                   double* best, int64_t* index) {
  nearest_codes_of_tile(latents, codebook, num_codes, depth, best, index);
}

// Where the latents of a tensor are: latent n, counted row by row over all dimensions but the
// channels', starts at offset(n), and its elements are channel_stride apart. Any strides will do,
// so channels_first, channels_last and sliced tensors are read and written in place.
class Positions {
 public:
  Positions(const at::Tensor& tensor, int64_t channel_dim)
      : channel_stride(tensor.stride(channel_dim)) {
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
      if (dim == channel_dim || size == 1) continue;
      if (!sizes_.empty() && strides_.back() == stride * size) {
        sizes_.back() *= size;
        strides_.back() = stride;
      } else {
        sizes_.push_back(size);
        strides_.push_back(stride);
      }
    }
  }

  int64_t offset(int64_t n) const {
    int64_t result = 0;
    for (size_t i = sizes_.size(); i-- > 0;) {
      result += n % sizes_[i] * strides_[i];
      n /= sizes_[i];
    }
    return result;
  }

  const int64_t channel_stride;

 private:
  std::vector<int64_t> sizes_, strides_;
};

// One tile at a time: gather, search, scatter. Each tile has its own place in `loss_of_tile`, so
// the result does not depend on which thread did it. Returns whether z holds NaN.
template <typename Z, typename T>
bool quantize_tiles(const at::Tensor& z, const at::Tensor& codebook, int64_t channel_dim,
                    at::Tensor& z_q, at::Tensor& indices, std::vector<double>& loss_of_tile) {
  const int64_t num_codes = codebook.size(0), depth = codebook.size(1);
  const int64_t num_latents = indices.numel();
  const Positions from(z, channel_dim), to(z_q, channel_dim);
  const Z* z_data = z.const_data_ptr<Z>();
  const T* codes = codebook.const_data_ptr<T>();
  Z* z_q_data = z_q.mutable_data_ptr<Z>();
  int64_t* index_data = indices.mutable_data_ptr<int64_t>();
  std::atomic<bool> found_nan{false};

  const int64_t grain = std::max<int64_t>(1, kDistancesPerTask / (num_codes * kTile));
  at::parallel_for(0, loss_of_tile.size(), grain, [&](int64_t begin, int64_t end) {
    std::vector<T> latents(depth * kTile, T(0));
    T best[kTile];
    IndexOf<T> index[kTile];
    bool has_nan = false;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile;
      const int count = static_cast<int>(std::min<int64_t>(kTile, num_latents - first));
      for (int p = 0; p < count; ++p) {
        const Z* latent = z_data + from.offset(first + p);
        for (int64_t d = 0; d < depth; ++d) {
          const T value = static_cast<T>(latent[d * from.channel_stride]);
          has_nan |= value != value;
          latents[d * kTile + p] = value;
        }
      }
      nearest_codes(latents.data(), codes, num_codes, depth, best, index);
      double loss = 0;
      for (int p = 0; p < count; ++p) {
        loss += best[p];
        index_data[first + p] = index[p];
        const T* code = codes + static_cast<int64_t>(index[p]) * depth;
        Z* target = z_q_data + to.offset(first + p);
        for (int64_t d = 0; d < depth; ++d) target[d * to.channel_stride] = static_cast<Z>(code[d]);
      }
      loss_of_tile[tile] = loss;
    }
    if (has_nan) found_nan = true;
  });
  return found_nan;
}

template <typename Z, typename T>
void gradients(const at::Tensor& grad_z_q, double grad_codebook_loss, double grad_commitment_loss,
               const at::Tensor& z, const at::Tensor& codebook, const at::Tensor& indices,
               int64_t channel_dim, at::Tensor& grad_z, at::Tensor& grad_codebook) {
  const int64_t depth = codebook.size(1), num_latents = indices.numel();
  const T share = num_latents == 0 ? T(0) : T(2) / static_cast<T>(z.numel());
  const T to_latent = static_cast<T>(grad_commitment_loss);
  const T to_code = static_cast<T>(-grad_codebook_loss);
  const Positions at_z(z, channel_dim), at_grad(grad_z_q, channel_dim), to(grad_z, channel_dim);
  const Z* z_data = z.const_data_ptr<Z>();
  const Z* grad_data = grad_z_q.const_data_ptr<Z>();
  const T* codes = codebook.const_data_ptr<T>();
  const int64_t* index_data = indices.const_data_ptr<int64_t>();
  Z* grad_z_data = grad_z.mutable_data_ptr<Z>();
  T* grad_codebook_data = grad_codebook.mutable_data_ptr<T>();

  at::parallel_for(0, num_latents, std::max<int64_t>(1, kElementsPerTask / depth),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t n = begin; n < end; ++n) {
                       const Z* latent = z_data + at_z.offset(n);
                       const Z* grad = grad_data + at_grad.offset(n);
                       Z* target = grad_z_data + to.offset(n);
                       const T* code = codes + index_data[n] * depth;
                       for (int64_t d = 0; d < depth; ++d) {
                         const T toward =
                             (static_cast<T>(latent[d * at_z.channel_stride]) - code[d]) * share;
                         target[d * to.channel_stride] = static_cast<Z>(
                             static_cast<T>(grad[d * at_grad.channel_stride]) + to_latent * toward);
                       }
                     }
                   });
  // A thread owns whole columns of the codebook and adds in the order of the latents, so no two
  // threads write to one place and the sum has one order.
  at::parallel_for(0, depth, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, num_latents)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t n = 0; n < num_latents; ++n) {
                       const Z* latent = z_data + at_z.offset(n);
                       const int64_t row = index_data[n] * depth;
                       for (int64_t d = begin; d < end; ++d) {
                         const T toward =
                             (static_cast<T>(latent[d * at_z.channel_stride]) - codes[row + d]) *
                             share;
                         grad_codebook_data[row + d] += to_code * toward;
                       }
                     }
                   });
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

std::tuple<at::Tensor, at::Tensor, at::Tensor, bool> vector_quantize_fwd(const at::Tensor& z,
                                                                         const at::Tensor& codebook,
                                                                         int64_t channel_dim) {
  check(z, codebook, channel_dim);
  at::Tensor z_q = at::empty_like(z);
  std::vector<int64_t> shape = z.sizes().vec();
  shape.erase(shape.begin() + channel_dim);
  at::Tensor indices = at::empty(shape, z.options().dtype(at::kLong));
  std::vector<double> loss_of_tile((indices.numel() + kTile - 1) / kTile);
  bool has_nan = false;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, z.scalar_type(), "vector_quantize_fwd", [&] {
        has_nan = codebook.scalar_type() == at::kDouble
                      ? quantize_tiles<scalar_t, double>(z, codebook, channel_dim, z_q, indices,
                                                         loss_of_tile)
                      : quantize_tiles<scalar_t, float>(z, codebook, channel_dim, z_q, indices,
                                                        loss_of_tile);
      });
  double sum = 0;
  for (const double loss : loss_of_tile) sum += loss;
  const at::Tensor mean =
      at::scalar_tensor(sum / static_cast<double>(z.numel()), codebook.options());
  return {z_q, indices, mean, has_nan};
}

std::tuple<at::Tensor, at::Tensor> vector_quantize_bwd(const at::Tensor& grad_z_q,
                                                       double grad_codebook_loss,
                                                       double grad_commitment_loss,
                                                       const at::Tensor& z,
                                                       const at::Tensor& codebook,
                                                       const at::Tensor& indices,
                                                       int64_t channel_dim) {
  check(z, codebook, channel_dim);
  TORCH_CHECK(grad_z_q.sizes() == z.sizes() && grad_z_q.scalar_type() == z.scalar_type(),
              "grad_z_q: expected the shape and dtype of z");
  const at::Tensor dense_indices = indices.contiguous();
  at::Tensor grad_z = at::empty_like(z);
  at::Tensor grad_codebook = at::zeros_like(codebook);
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

}  // namespace fastldm
