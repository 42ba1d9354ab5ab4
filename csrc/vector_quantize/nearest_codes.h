// The nearest codebook entries, by whichever search is fastest for the sizes; all give one answer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "vector_quantize/search_kernels.h"

namespace fastldm {

// The search for so many float32 latents, "screen", "tree" or "narrow screen", by measured times.
const char* fastest_search(int64_t num_codes, int64_t depth, int64_t num_latents);

template <typename T>
class NearestCodes;

template <>
class NearestCodes<float> {
 public:
  // codebook: [num_codes, depth] without NaN; it must outlive this object.
  NearestCodes(const float* codebook, int64_t num_codes, int64_t depth, int64_t num_latents);

  // latents: [depth, kTile], of which the first `count`, without NaN. scratch: this thread's own.
  void find(const float* latents, int64_t count, std::vector<float>& scratch, int64_t* index) const;

  // Estimated time of one latent on one core, in nanoseconds.
  double cost() const { return cost_; }

 private:
  const SearchKernels& kernels_;
  const float* codebook_;
  const int64_t num_codes_, depth_;
  double cost_;
  std::unique_ptr<BoxTree> tree_;
  std::unique_ptr<NarrowScreen> narrow_;
  std::unique_ptr<CodeScreen> screen_;
};

template <>
class NearestCodes<double> {
 public:
  NearestCodes(const double* codebook, int64_t num_codes, int64_t depth, int64_t)
      : kernels_(search_kernels()), codebook_(codebook), num_codes_(num_codes), depth_(depth) {}

  void find(const double* latents, int64_t count, std::vector<double>&, int64_t* index) const {
    int64_t found[kTile];
    kernels_.exhaustive64(codebook_, num_codes_, depth_, latents, count, found);
    std::copy_n(found, count, index);
  }

  double cost() const { return 0.1 * static_cast<double>(num_codes_ * depth_); }

 private:
  const SearchKernels& kernels_;
  const double* codebook_;
  const int64_t num_codes_, depth_;
};

}  // namespace fastldm
