// Attention of one head, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "fastldm/attention_view.h"

namespace fastldm {

struct AttentionKernels {
  int64_t lanes;    // of a register
  int64_t queries;  // of a call of `attend`, at most
  int64_t (*scratch)(int64_t channels);
  // Both write [count · channels + kPackingMargin].
  void (*pack_by_key)(Rows keys, int64_t count, int64_t channels, float* to);
  void (*pack_by_channel)(Rows keys, int64_t count, int64_t channels, float* to);
  // scratch: as many floats as that function says; outputs: rows `stride` apart
  void (*attend)(const PackedHead& head, double scale, Rows queries, int64_t count, float* scratch,
                 float* outputs, int64_t stride);
  int64_t (*gradient_queries)(int64_t keys);  // of a call of `gradients`, at most
  int64_t (*gradient_scratch)(int64_t keys, int64_t channels);
  // queries and upstream: [count, padded]; grad_queries: rows `stride` apart; the others,
  // [keys, padded], are added to; null where not wanted
  void (*gradients)(const PackedGradientHead& head, double scale, const float* queries,
                    const float* upstream, int64_t count, float* scratch, float* grad_queries,
                    int64_t stride, float* grad_keys, float* grad_values);
};

// Null where this build or this processor does not have the instruction set.
const AttentionKernels* avx512_attention();
const AttentionKernels* avx2_attention();
const AttentionKernels* portable_attention();

}  // namespace fastldm
