// Whether a kernel may be called past torch's dispatcher: fastldm/ops/_direct.py for eager C++.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

namespace fastldm {

// Whether no function transform, mode or forward-mode level sees what this thread calls.
inline bool nothing_listens() {
  constexpr c10::DispatchKeySet kInference(c10::DispatchKey::BackendSelect);
  constexpr c10::DispatchKeySet kUsual = kInference.add(c10::DispatchKey::ADInplaceOrView);
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included == kUsual || included == kInference) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// Whether it is a tensor in the CPU's memory and nothing else: no wrapper, no lazy conjugate.
inline bool is_plain_on_cpu(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kInference({c10::DispatchKey::CPU, c10::DispatchKey::AutocastCPU});
  constexpr c10::DispatchKeySet kUsual = kInference.add(c10::DispatchKey::ADInplaceOrView) |
                                         c10::DispatchKeySet(c10::DispatchKey::AutogradCPU);
  return tensor.key_set() == kUsual || tensor.key_set() == kInference;
}

}  // namespace fastldm
