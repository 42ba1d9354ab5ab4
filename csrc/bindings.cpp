#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <string>

#include "cross_attention/cpu.h"
#include "diffusion_step/cpu.h"
#include "geglu/cpu.h"
#include "group_norm_silu/autograd.h"
#include "group_norm_silu/cpu.h"
#include "recorded.h"
#include "vector_quantize/cpu.h"
#include "vector_quantize/nearest_codes.h"
#include "vector_quantize/search_kernels.h"
#ifdef FASTLDM_WITH_CUDA
#include "vector_quantize/cuda.h"
#endif

namespace {

template <typename Kernel>
void define(pybind11::module_& module, const char* name, Kernel* kernel) {
  module.def(name, fastldm::recorded(name, kernel),
             pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of fastldm; reached through fastldm.ops.";
  // Compared with the running torch before any kernel is called.
  module.attr("torch_version") = TORCH_VERSION;
#ifdef __clang__
  module.attr("compiler") = __VERSION__;
#else
  module.attr("compiler") = "GCC " __VERSION__;
#endif
#ifdef FASTLDM_WITH_CUDA
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
  define(module, "cross_attention_fwd", &fastldm::cross_attention_fwd);
  define(module, "cross_attention_bwd", &fastldm::cross_attention_bwd);
  define(module, "diffusion_step_fwd", &fastldm::diffusion_step_fwd);
  define(module, "geglu_fwd", &fastldm::geglu_fwd);
  define(module, "geglu_bwd", &fastldm::geglu_bwd);
  module.def("group_norm_silu", &fastldm::eager_group_norm_silu);
  define(module, "group_norm_silu_fwd", &fastldm::group_norm_silu_fwd);
  define(module, "group_norm_silu_bwd", &fastldm::group_norm_silu_bwd);
  define(module, "vector_quantize_fwd", &fastldm::vector_quantize_fwd);
  define(module, "vector_quantize_bwd", &fastldm::vector_quantize_bwd);
  define(module, "codebook_statistics", &fastldm::codebook_statistics);
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto* kernels : fastldm::usable_search_kernels()) names.emplace_back(kernels->name);
    return names;
  });
  module.def("use_instruction_set", &fastldm::use_search_kernels);
  module.def("fastest_search", &fastldm::fastest_search);
#ifdef FASTLDM_WITH_CUDA
  define(module, "vector_quantize_fwd_cuda", &fastldm::cuda::vector_quantize_fwd);
  define(module, "vector_quantize_bwd_cuda", &fastldm::cuda::vector_quantize_bwd);
  define(module, "codebook_statistics_cuda", &fastldm::cuda::codebook_statistics);
#endif
}
