#include "vector_quantize/nearest_codes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

namespace fastldm {
namespace {

// Times in nanoseconds, as measured with AVX2 on normally distributed latents and codes. What
// hangs on them is which search runs, never what it finds.
struct Costs {
  double prepare, find;

  double total(int64_t num_latents) const {
    return prepare + find * static_cast<double>(num_latents);
  }
};

Costs narrow_costs(double codes, double depth) {
  return {3 * codes * depth, 15 + codes * (0.03 + 0.02 * depth)};
}

Costs screen_costs(double codes, double depth) {
  return {1.5 * codes * depth, 80 + codes * (0.02 + 0.027 * depth)};
}

Costs tree_costs(double codes, double depth) {
  return {codes * std::log2(codes) * (14 + depth), 50 * std::pow(1.6, depth)};
}

// Work that is worth another thread.
constexpr double kNanosecondsPerTask = 1e5;

// Parts of a preparation: one for each thread, where there is work for them.
int parts_of(double nanoseconds) {
  const double most = std::min<double>(at::get_num_threads(), nanoseconds / kNanosecondsPerTask);
  int parts = 1;
  while (2 * parts <= most) parts *= 2;
  return parts;
}

// Runs the tasks of a preparation that takes so long in all.
auto runner(double nanoseconds) {
  return [nanoseconds](int64_t count, const auto& task) {
    const double tasks = static_cast<double>(count) * kNanosecondsPerTask / nanoseconds;
    at::parallel_for(0, count, std::max<int64_t>(1, static_cast<int64_t>(tasks)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) task(i);
                     });
  };
}

bool is_tree_faster(double codes, double depth, int64_t num_latents) {
  return tree_costs(codes, depth).total(num_latents) < narrow_costs(codes, depth).total(num_latents);
}

}  // namespace

const char* fastest_search(int64_t num_codes, int64_t depth, int64_t num_latents) {
  if (depth > kMaxNarrowDepth) return "screen";
  const double codes = static_cast<double>(num_codes), width = static_cast<double>(depth);
  return is_tree_faster(codes, width, num_latents) ? "tree" : "narrow screen";
}

NearestCodes<float>::NearestCodes(const float* codebook, int64_t num_codes, int64_t depth,
                                  int64_t num_latents)
    : kernels_(search_kernels()), codebook_(codebook), num_codes_(num_codes), depth_(depth) {
  const double codes = static_cast<double>(num_codes), width = static_cast<double>(depth);
  if (depth > kMaxNarrowDepth) {
    const Costs costs = screen_costs(codes, width);
    cost_ = costs.find;
    screen_ = std::make_unique<CodeScreen>(codebook, num_codes, depth, 2 * kernels_.lanes,
                                           runner(costs.prepare));
    return;
  }
  if (is_tree_faster(codes, width, num_latents)) {
    const Costs costs = tree_costs(codes, width);
    cost_ = costs.find;
    tree_ = std::make_unique<BoxTree>(codebook, num_codes, depth, kernels_.lanes,
                                      parts_of(costs.prepare), runner(costs.prepare));
  } else {
    cost_ = narrow_costs(codes, width).find;
    narrow_ = std::make_unique<NarrowScreen>(codebook, num_codes, depth);
  }
}

void NearestCodes<float>::find(const float* latents, int64_t count, std::vector<float>& scratch,
                               int64_t* index) const {
  int32_t found[kTile];
  if (tree_) {
    kernels_.box_tree(tree_->view(), latents, count, found);
  } else if (narrow_) {
    kernels_.narrow_screen(narrow_->view(), latents, count, found);
  } else {
    const CodeScreenView& view = screen_->view();
    scratch.resize(kTile * (depth_ + view.blocks()));
    kernels_.code_screen(view, latents, count, scratch.data(), found);
    // Those with too many candidates, side by side.
    int32_t place[kTile], found_rest[kTile];
    int64_t rest_count = 0;
    for (int64_t n = 0; n < count; ++n)
      if (found[n] < 0) place[rest_count++] = static_cast<int32_t>(n);
    if (rest_count > 0) {
      for (int64_t d = 0; d < depth_; ++d)
        for (int64_t i = 0; i < kTile; ++i)
          scratch[d * kTile + i] = i < rest_count ? latents[d * kTile + place[i]] : 0.0f;
      kernels_.exhaustive(codebook_, num_codes_, depth_, scratch.data(), rest_count, found_rest);
      for (int64_t i = 0; i < rest_count; ++i) found[place[i]] = found_rest[i];
    }
  }
  std::copy_n(found, count, index);
}

}  // namespace fastldm
