#define FASTLDM_ISA portable
#define FASTLDM_ISA_NAME "portable"
#include "vector_quantize/search_kernels_table.h"

namespace fastldm {
const SearchKernels* portable_kernels() { return portable::table(); }
}  // namespace fastldm
