// GroupNorm + SiLU of eager tensors on the CPU, recorded for the backward pass where that is on.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "group_norm_silu/cpu.h"

namespace fastldm {

// None where an argument is no plain CPU tensor, or where somebody listens: see listeners.h. Then
// torch's dispatcher has to be asked.
pybind11::object eager_group_norm_silu(pybind11::handle x, int64_t num_groups,
                                       pybind11::handle weight, pybind11::handle bias, double eps,
                                       bool silu, pybind11::handle channel_add,
                                       pybind11::handle residual, pybind11::handle scale,
                                       pybind11::handle shift);

}  // namespace fastldm
