#include "group_norm_silu/cpu.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "fastldm/group_norm_silu.h"
#include "fastldm/group_norm_silu_backward.h"
#include "fastldm/group_norm_silu_channels_last.h"
#include "fastldm/group_norm_silu_parameters.h"
#include "parallel.h"
#include "tensor_memory.h"

namespace fastldm {
namespace {

using at::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

bool has_channels_innermost(const Tensor& x) {
  return x.dim() > 2 && x.stride(1) == 1 && !x.is_contiguous();
}

// torch's name for the layout, where it has one.
std::optional<at::MemoryFormat> format_of(const Tensor& x, bool channels_last) {
  if (!channels_last) return at::MemoryFormat::Contiguous;
  if (x.dim() == 4) return at::MemoryFormat::ChannelsLast;
  if (x.dim() == 5) return at::MemoryFormat::ChannelsLast3d;
  return {};
}

Tensor dense(const Tensor& x, bool channels_last) {
  if (const auto format = format_of(x, channels_last)) return x.contiguous(*format);
  return x.movedim(1, -1).contiguous().movedim(-1, 1);
}

Tensor empty_in_layout(const Tensor& x, bool channels_last) {
  if (const auto format = format_of(x, channels_last)) {
    return at::empty(x.sizes(), x.options(), *format);
  }
  return at::empty_like(x.movedim(1, -1)).movedim(-1, 1);
}

// The operands of a call, dense and in the types that the kernels take. Holds what they point to.
class Call {
 public:
  Call(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
       const OptionalTensor& bias, double eps, bool silu, const OptionalTensor& channel_add,
       const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& shift)
      : channels_last(has_channels_innermost(x)),
        type(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
        x(dense(x, channels_last)),
        groups_(num_groups),
        eps_(eps),
        silu_(silu) {
    TORCH_CHECK(x.device().is_cpu(), "x: expected a CPU tensor");
    TORCH_CHECK(x.dim() >= 2 && x.size(1) > 0 && (x.numel() > 0 || x.size(0) == 0),
                "x: expected [B, C, *spatial] with at least one channel and one pixel");
    TORCH_CHECK(num_groups > 0 && x.size(1) % num_groups == 0,
                "num_groups: expected a divisor of the channels");
    const int64_t batch = x.size(0), channels = x.size(1);
    weight_ = parameter(weight, {channels});
    bias_ = parameter(bias, {channels});
    channel_add_ = parameter(channel_add, {batch, channels});
    scale_ = parameter(scale, {batch, channels});
    shift_ = parameter(shift, {batch, channels});
    if (residual) residual_ = like_x(*residual);
  }

  // In the dtype and layout of x.
  Tensor like_x(const Tensor& value) const {
    TORCH_CHECK(value.sizes() == x.sizes() && value.scalar_type() == x.scalar_type() &&
                    value.device() == x.device(),
                "expected the shape, dtype and device of x");
    return dense(value, channels_last);
  }

  Tensor parameter(const OptionalTensor& value, at::IntArrayRef sizes) const {
    if (!value) return {};
    TORCH_CHECK(value->sizes() == sizes && value->is_floating_point() && value->device().is_cpu(),
                "a parameter has the shape ", value->sizes(), ", expected ", sizes,
                " in a floating dtype on the CPU");
    return (value->scalar_type() == type ? *value : value->to(type)).contiguous();
  }

  int64_t pixels() const { return x.numel() ? x.numel() / (x.size(0) * x.size(1)) : 0; }
  int64_t tasks() const { return x.size(0) * groups_; }

  template <typename T>
  void fill(norm::Operands<T>& operands) const {
    operands.x = source(x);
    operands.residual = source(residual_);
    operands.weight = data<const T>(weight_);
    operands.bias = data<const T>(bias_);
    operands.channel_add = data<const T>(channel_add_);
    operands.scale = data<const T>(scale_);
    operands.shift = data<const T>(shift_);
    operands.batch = x.size(0);
    operands.channels = x.size(1);
    operands.pixels = pixels();
    operands.groups = groups_;
    operands.eps = eps_;
    operands.silu = silu_;
  }

  const bool channels_last;
  const at::ScalarType type;
  const Tensor x;

 private:
  int64_t groups_;
  double eps_;
  bool silu_;
  Tensor weight_, bias_, channel_add_, residual_, scale_, shift_;
};

template <typename T>
void forward(const Call& call, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  norm::Operands<T> from;
  call.fill(from);
  if (!call.channels_last) {
    run_tasks(call.tasks(), from.group_channels() * from.pixels,
              norm::ContiguousForward<T>{from, target(y), data<T>(mean), data<T>(rstd)});
    return;
  }
  const norm::Blocks blocks(from.channels, from.pixels);
  const int64_t tasks = from.batch * blocks.per_sample;
  const int64_t elements = blocks.pixels_each * from.channels;
  std::vector<Moments> moments(tasks * from.groups);
  run_tasks(tasks, elements, norm::ChannelsLastMoments<T>{from, blocks, moments.data()});
  run_tasks(tasks, elements,
            norm::ChannelsLastForward<T>{from, blocks, moments.data(), target(y), data<T>(mean),
                                         data<T>(rstd)});
}

template <typename T>
void backward(const Call& call, const Tensor& grad_y, const Tensor& mean, const Tensor& rstd,
              const Tensor& grad_x, const std::vector<Tensor>& of_parameters) {
  norm::BackwardOperands<T> from;
  call.fill(from);
  from.grad_y = source(grad_y);
  from.mean = data<const T>(mean);
  from.rstd = data<const T>(rstd);
  const int64_t rows = from.batch * from.channels;
  std::vector<double> memory(3 * rows);
  const norm::ChannelSums sums{memory.data(), memory.data() + rows, memory.data() + 2 * rows};
  const bool with_sum_of_n = of_parameters[2].defined();
  if (!call.channels_last) {
    run_tasks(call.tasks(), from.group_channels() * from.pixels,
              norm::ContiguousBackward<T>{from, sums, target(grad_x), with_sum_of_n});
  } else {
    const norm::Blocks blocks(from.channels, from.pixels);
    const int64_t tasks = from.batch * blocks.per_sample;
    const int64_t elements = blocks.pixels_each * from.channels;
    std::vector<T> parts(tasks * 3 * from.channels);
    run_tasks(tasks, elements,
              norm::ChannelsLastSums<T>{from, blocks, target(grad_x), parts.data(), with_sum_of_n});
    for_each_range(from.batch, blocks.per_sample * from.channels, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        norm::merge_blocks(from, parts.data(), blocks.per_sample, b, sums.from(b * from.channels));
      }
    });
    if (grad_x.defined()) {
      run_tasks(tasks, elements, norm::ChannelsLastBackward<T>{from, blocks, sums, target(grad_x)});
    }
  }
  run_tasks(from.groups, rows / from.groups,
            norm::ParameterGradients<T>{from, sums, data<T>(of_parameters[0]),
                                        data<T>(of_parameters[1]), data<T>(of_parameters[2]),
                                        data<T>(of_parameters[3]), data<T>(of_parameters[4])});
}

// The statistics are kept where they are given a place.
Tensor forward(const Call& call, const Tensor& mean, const Tensor& rstd) {
  const Tensor y = empty_in_layout(call.x, call.channels_last);
  if (call.type == at::kDouble) {
    forward<double>(call, y, mean, rstd);
  } else {
    forward<float>(call, y, mean, rstd);
  }
  return y;
}

}  // namespace

Tensor group_norm_silu(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, bool silu,
                       const OptionalTensor& channel_add, const OptionalTensor& residual,
                       const OptionalTensor& scale, const OptionalTensor& shift) {
  return forward({x, num_groups, weight, bias, eps, silu, channel_add, residual, scale, shift}, {},
                 {});
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_fwd(
    const Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, bool silu, const OptionalTensor& channel_add, const OptionalTensor& residual,
    const OptionalTensor& scale, const OptionalTensor& shift) {
  const Call call(x, num_groups, weight, bias, eps, silu, channel_add, residual, scale, shift);
  const Tensor mean = at::empty({x.size(0), num_groups}, x.options().dtype(call.type));
  const Tensor rstd = at::empty({x.size(0), num_groups}, x.options().dtype(call.type));
  return {forward(call, mean, rstd), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_bwd(
    const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    bool silu, const OptionalTensor& channel_add, const OptionalTensor& residual,
    const OptionalTensor& scale, const OptionalTensor& shift, const std::vector<bool>& wanted) {
  const Call call(x, num_groups, weight, bias, eps, silu, channel_add, residual, scale, shift);
  const Tensor upstream = call.like_x(grad_y);
  const Tensor means = call.parameter(mean, {x.size(0), num_groups}),
               rstds = call.parameter(rstd, {x.size(0), num_groups});
  const Tensor grad_x = wanted[0] ? empty_in_layout(call.x, call.channels_last) : Tensor();
  const OptionalTensor* parameters[] = {&weight, &bias, &channel_add, &scale, &shift};
  std::vector<Tensor> gradients(std::size(parameters));
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (wanted[i + 1] && *parameters[i]) {
      gradients[i] = at::empty((*parameters[i])->sizes(), x.options().dtype(call.type));
    }
  }
  if (call.type == at::kDouble) {
    backward<double>(call, upstream, means, rstds, grad_x, gradients);
  } else {
    backward<float>(call, upstream, means, rstds, grad_x, gradients);
  }
  // A tensor each: the outputs of an operator may not share memory.
  const auto or_empty = [&x](const Tensor& gradient, at::ScalarType type) {
    return gradient.defined() ? gradient.to(type) : at::empty({0}, x.options());
  };
  for (size_t i = 0; i < gradients.size(); ++i) {
    gradients[i] =
        or_empty(gradients[i], *parameters[i] ? (*parameters[i])->scalar_type() : x.scalar_type());
  }
  return {or_empty(grad_x, x.scalar_type()),
          gradients[0],
          gradients[1],
          gradients[2],
          gradients[3],
          gradients[4]};
}

}  // namespace fastldm
