#include "group_norm_silu/autograd.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>

#include "listeners.h"
#include "recorded.h"

namespace fastldm {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x, weight, bias, channel_add, residual, scale and shift.
constexpr size_t kTensors = 7;
using Operands = std::array<Tensor, kTensors>;

OptionalTensor given(const Tensor& value) {
  return value.defined() ? OptionalTensor(value) : std::nullopt;
}

// A gradient for each operand, undefined where it is not needed.
using Needs = std::array<bool, kTensors>;

variable_list gradients_of(const Operands& of, const Tensor& mean, const Tensor& rstd,
                           const Needs& needs, const Tensor& grad_y, int64_t num_groups, double eps,
                           bool silu) {
  static const auto kernel = recorded("group_norm_silu_bwd", &group_norm_silu_bwd);
  const auto [dx, dweight, dbias, dadd, dscale, dshift] =
      kernel(grad_y, of[0], mean, rstd, num_groups, given(of[1]), given(of[2]), eps, silu,
             given(of[3]), given(of[4]), given(of[5]), given(of[6]),
             {needs[0] || needs[4], needs[1], needs[2], needs[3], needs[5], needs[6]});
  const variable_list found = {dx, dweight, dbias, dadd, dx, dscale, dshift};
  variable_list wanted(kTensors);
  for (size_t i = 0; i < kTensors; ++i) {
    if (needs[i]) wanted[i] = found[i];
  }
  return wanted;
}

// The same through torch's dispatcher, and as a graph of their own where one is recorded.
variable_list gradients_for_listeners(const Operands& of, const Tensor& mean, const Tensor& rstd,
                                      const Needs& needs, const Tensor& grad_y, int64_t num_groups,
                                      double eps, bool silu) {
  const py::gil_scoped_acquire acquired;
  py::list operands, needed;
  for (size_t i = 0; i < kTensors; ++i) {
    operands.append(of[i].defined() ? py::cast(of[i]) : py::none());
    needed.append(py::bool_(needs[i]));
  }
  const py::tuple found =
      py::module_::import("fastldm.ops.group_norm_silu.functional")
          .attr("gradients")(operands, mean, rstd, needed, grad_y, num_groups, eps, silu, "cpp");
  variable_list wanted(kTensors);
  for (size_t i = 0; i < kTensors; ++i) {
    if (!found[i].is_none()) wanted[i] = found[i].cast<Tensor>();
  }
  return wanted;
}

struct GroupNormSilu : torch::autograd::Function<GroupNormSilu> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& channel_add,
                        const OptionalTensor& residual, const OptionalTensor& scale,
                        const OptionalTensor& shift, int64_t num_groups, double eps, bool silu) {
    static const auto kernel = recorded("group_norm_silu_fwd", &group_norm_silu_fwd);
    const auto [y, mean, rstd] =
        kernel(x, num_groups, weight, bias, eps, silu, channel_add, residual, scale, shift);
    variable_list saved = {x};
    for (const OptionalTensor* value : {&weight, &bias, &channel_add, &residual, &scale, &shift}) {
      saved.push_back(value->value_or(Tensor()));
    }
    saved.insert(saved.end(), {mean, rstd});
    context->save_for_backward(std::move(saved));
    context->saved_data["num_groups"] = num_groups;
    context->saved_data["eps"] = eps;
    context->saved_data["silu"] = silu;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    Operands of;
    std::copy_n(saved.begin(), kTensors, of.begin());
    Needs needs = {};
    for (size_t i = 0, edge = 0; i < kTensors; ++i) {
      if (of[i].defined()) needs[i] = context->needs_input_grad(edge++);
    }
    const Tensor &mean = saved[kTensors], &rstd = saved[kTensors + 1], &grad_y = grads[0];
    const bool is_plain =
        is_plain_on_cpu(grad_y) && std::all_of(saved.begin(), saved.end(), [](const Tensor& value) {
          return !value.defined() || is_plain_on_cpu(value);
        });
    const bool is_direct = is_plain && !at::GradMode::is_enabled() && nothing_listens();
    const auto gradients = is_direct ? &gradients_of : &gradients_for_listeners;
    variable_list result =
        gradients(of, mean, rstd, needs, grad_y, context->saved_data["num_groups"].toInt(),
                  context->saved_data["eps"].toDouble(), context->saved_data["silu"].toBool());
    result.resize(kTensors + 3);  // the numbers have none
    return result;
  }
};

}  // namespace

py::object eager_group_norm_silu(py::handle x, int64_t num_groups, py::handle weight,
                                 py::handle bias, double eps, bool silu, py::handle channel_add,
                                 py::handle residual, py::handle scale, py::handle shift) {
  if (!nothing_listens()) return py::none();
  const std::array<py::handle, kTensors> arguments = {x,        weight, bias, channel_add,
                                                      residual, scale,  shift};
  Operands of;
  bool is_recorded = false;
  for (size_t i = 0; i < kTensors; ++i) {
    if (i > 0 && arguments[i].is_none()) continue;
    if (!THPVariable_CheckExact(arguments[i].ptr())) return py::none();
    of[i] = THPVariable_Unpack(arguments[i].ptr());
    if (!is_plain_on_cpu(of[i])) return py::none();
    is_recorded = is_recorded || of[i].requires_grad();
  }
  Tensor y;
  {
    const py::gil_scoped_release released;
    if (is_recorded && at::GradMode::is_enabled()) {
      y = GroupNormSilu::apply(of[0], given(of[1]), given(of[2]), given(of[3]), given(of[4]),
                               given(of[5]), given(of[6]), num_groups, eps, silu);
    } else {
      static const auto kernel = recorded("group_norm_silu", &group_norm_silu);
      y = kernel(of[0], num_groups, given(of[1]), given(of[2]), eps, silu, given(of[3]),
                 given(of[4]), given(of[5]), given(of[6]));
    }
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
}

}  // namespace fastldm
