#define FASTLDM_ISA portable
#include "cross_attention/attention_kernels_table.h"

namespace fastldm {
const AttentionKernels* portable_attention() { return portable::attention_table(); }
}  // namespace fastldm
