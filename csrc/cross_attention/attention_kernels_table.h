// The table of one instruction set's kernels, and no more; included after the target pragma.
#pragma once

#include "cross_attention/attention_kernels.h"
#include "fastldm/attention.h"
#include "fastldm/attention_backward.h"

namespace fastldm::FASTLDM_ISA {

inline void attend(const PackedHead& head, double scale, Rows queries, int64_t count,
                   float* scratch, float* outputs, int64_t stride) {
  Attention(head, scale, scratch).run(queries, count, outputs, stride);
}

inline void find_gradients(const PackedGradientHead& head, double scale, const float* queries,
                           const float* upstream, int64_t count, float* scratch,
                           float* grad_queries, int64_t stride, float* grad_keys,
                           float* grad_values) {
  AttentionGradients(head, scale, scratch)
      .run(queries, upstream, count, grad_queries, stride, grad_keys, grad_values);
}

const AttentionKernels* attention_table() {
  static constexpr AttentionKernels kTable = {
      kFloats,
      Attention::kQueries,
      &Attention::scratch,
      &pack_by_key,
      &pack_by_channel,
      &attend,
      &AttentionGradients::queries,
      &AttentionGradients::scratch,
      &find_gradients,
  };
  return &kTable;
}

}  // namespace fastldm::FASTLDM_ISA
