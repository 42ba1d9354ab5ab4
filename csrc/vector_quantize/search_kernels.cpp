#include "vector_quantize/search_kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastldm {

std::vector<const SearchKernels*> usable_search_kernels() {
  std::vector<const SearchKernels*> usable;
  for (const SearchKernels* kernels : {avx512_kernels(), avx2_kernels(), portable_kernels()})
    if (kernels != nullptr) usable.push_back(kernels);
  return usable;
}

static const SearchKernels* chosen = usable_search_kernels().front();

const SearchKernels& search_kernels() { return *chosen; }

void use_search_kernels(const std::string& name) {
  for (const SearchKernels* kernels : usable_search_kernels()) {
    if (name == kernels->name) {
      chosen = kernels;
      return;
    }
  }
  throw std::invalid_argument("no kernels for the instruction set " + name + " here");
}

}  // namespace fastldm
