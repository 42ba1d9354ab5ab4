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

Costs exhaustive_costs(double codes, double depth) { return {0, codes * (0.03 + 0.05 * depth)}; }

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

}  // namespace

NearestCodes<float>::NearestCodes(const float* codebook, int64_t num_codes, int64_t depth,
                                  int64_t num_latents)
    : kernels_(search_kernels()), codebook_(codebook), num_codes_(num_codes), depth_(depth) {
  const double codes = static_cast<double>(num_codes), width = static_cast<double>(depth);
  const Costs all = exhaustive_costs(codes, width), screen = screen_costs(codes, width),
              tree = tree_costs(codes, width);
  if (depth <= kMaxTreeDepth && num_codes > kernels_.lanes &&
      tree.total(num_latents) < std::min(all.total(num_latents), screen.total(num_latents))) {
    tree_ = std::make_unique<BoxTree>(codebook, num_codes, depth, kernels_.lanes,
                                      parts_of(tree.prepare), runner(tree.prepare));
    cost_ = tree.find;
  } else if (screen.total(num_latents) < all.total(num_latents)) {
    screen_ = std::make_unique<CodeScreen>(codebook, num_codes, depth, 2 * kernels_.lanes,
                                           runner(screen.prepare));
    cost_ = screen.find;
  } else {
    cost_ = all.find;
  }
}

void NearestCodes<float>::find(const float* latents, int64_t count, std::vector<float>& scratch,
                               int64_t* index) const {
  int32_t found[kTile];
  const int64_t for_all = depth_ * kExhaustiveScratch;
  if (tree_) {
    kernels_.box_tree(tree_->view(), latents, count, found);
  } else if (screen_) {
    const CodeScreenView& view = screen_->view();
    scratch.resize(for_all + depth_ * kTile + kTile * (depth_ + view.blocks()));
    float* rest = scratch.data() + for_all;
    kernels_.code_screen(view, latents, count, rest + depth_ * kTile, found);
    // Those with too many candidates, side by side.
    int32_t place[kTile], found_rest[kTile];
    int64_t rest_count = 0;
    for (int64_t n = 0; n < count; ++n) {
      if (found[n] >= 0) continue;
      std::copy_n(latents + n * depth_, depth_, rest + rest_count * depth_);
      place[rest_count++] = static_cast<int32_t>(n);
    }
    kernels_.exhaustive(codebook_, num_codes_, depth_, rest, rest_count, scratch.data(),
                        found_rest);
    for (int64_t i = 0; i < rest_count; ++i) found[place[i]] = found_rest[i];
  } else {
    scratch.resize(for_all);
    kernels_.exhaustive(codebook_, num_codes_, depth_, latents, count, scratch.data(), found);
  }
  std::copy_n(found, count, index);
}

}  // namespace fastldm
