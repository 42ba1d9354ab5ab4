#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "cross_attention/cpu.h"
#include "diffusion_step/cpu.h"
#include "geglu/cpu.h"
#include "group_norm_silu/cpu.h"
#include "vector_quantize/cpu.h"
#include "vector_quantize/nearest_codes.h"
#include "vector_quantize/search_kernels.h"
#ifdef FASTLDM_WITH_CUDA
#include "vector_quantize/cuda.h"
#endif

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
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  module.def("cross_attention_fwd", &fastldm::cross_attention_fwd, unlocked);
  module.def("cross_attention_bwd", &fastldm::cross_attention_bwd, unlocked);
  module.def("diffusion_step_fwd", &fastldm::diffusion_step_fwd, unlocked);
  module.def("geglu_fwd", &fastldm::geglu_fwd, unlocked);
  module.def("geglu_bwd", &fastldm::geglu_bwd, unlocked);
  module.def("group_norm_silu", &fastldm::group_norm_silu, unlocked);
  module.def("group_norm_silu_fwd", &fastldm::group_norm_silu_fwd, unlocked);
  module.def("group_norm_silu_bwd", &fastldm::group_norm_silu_bwd, unlocked);
  module.def("vector_quantize_fwd", &fastldm::vector_quantize_fwd, unlocked);
  module.def("vector_quantize_bwd", &fastldm::vector_quantize_bwd, unlocked);
  module.def("codebook_statistics", &fastldm::codebook_statistics, unlocked);
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto* kernels : fastldm::usable_search_kernels()) names.emplace_back(kernels->name);
    return names;
  });
  module.def("use_instruction_set", &fastldm::use_search_kernels);
  module.def("fastest_search", &fastldm::fastest_search);
#ifdef FASTLDM_WITH_CUDA
  module.def("vector_quantize_fwd_cuda", &fastldm::cuda::vector_quantize_fwd, unlocked);
  module.def("vector_quantize_bwd_cuda", &fastldm::cuda::vector_quantize_bwd, unlocked);
  module.def("codebook_statistics_cuda", &fastldm::cuda::codebook_statistics, unlocked);
#endif
}
