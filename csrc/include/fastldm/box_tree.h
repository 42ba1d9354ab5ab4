// Nearest codebook entry of narrow latents: a tree of boxes around groups of codes.
//
// The codes are put into groups of `lanes`, near ones together, one group a register; `lanes`
// groups have their bounding boxes in a register of the level above, and so on up to one register.
// A latent goes down to the group whose box is nearest, and then through every box that could
// hold a nearer code or one as near.
//
// The answer is that of the exhaustive search to the bit, because the bound is exact in floating
// point, too. A box's distance is the sum over d, in order, of g_d^2, where g_d is the rounded
// distance to the box in dimension d. For a code in the box |z_d - e_d| >= g_d before rounding, and
// rounding, squaring and adding in the same order keep the order. So no code in a box is nearer
// than the box, and a box that is no farther than the best code so far is looked into.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace fastldm {

// Levels of boxes above the codes: 4^16 codes are beyond what an int32 counts.
constexpr int kMaxLevels = 15;

// What a search reads. Lanes without a code hold infinity, those without a box NaN.
struct BoxTreeView {
  int64_t depth = 0;
  int levels = 0;
  const float* codes = nullptr;    // [groups, depth, lanes]
  const int32_t* index = nullptr;  // [groups, lanes], ascending in each group
  // bounds[l]: [groups of level l + 1, 2 (low, high), depth, lanes]
  const float* bounds[kMaxLevels] = {};
};

class BoxTree {
 public:
  // codebook: [num_codes, depth] without NaN.
  // run(count, task): calls task(i) for every i below count, in any order or at once; called once.
  // parts: tasks to divide the work into, a power of two; the tree is the same for any.
  template <typename Run>
  BoxTree(const float* codebook, int64_t num_codes, int64_t depth, int lanes, int parts, Run run)
      : codebook_(codebook), num_codes_(num_codes), depth_(depth), lanes_(lanes) {
    order_.resize(num_codes);
    keys_.resize(num_codes);
    for (int64_t k = 0; k < num_codes; ++k) order_[k] = static_cast<int32_t>(k);
    std::vector<int64_t> ends = {0, num_codes};
    while (static_cast<int>(ends.size()) <= parts) {
      std::vector<int64_t> finer = {0};
      for (size_t i = 1; i < ends.size(); ++i) {
        finer.push_back(split(ends[i - 1], ends[i]));
        finer.push_back(ends[i]);
      }
      ends = std::move(finer);
    }
    run(parts, [&](int64_t i) { split_to_groups(ends[i], ends[i + 1]); });
    store_codes();
    store_boxes();
  }

  BoxTreeView view() const {
    BoxTreeView result;
    result.depth = depth_;
    result.codes = codes_.data();
    result.index = index_.data();
    result.levels = static_cast<int>(bounds_.size());
    for (int level = 0; level < result.levels; ++level)
      result.bounds[level] = bounds_[level].data();
    return result;
  }

 private:
  // Halves a range across its widest dimension, so that the lower half fills whole subtrees.
  // Returns where the upper half begins.
  int64_t split(int64_t begin, int64_t end) {
    int64_t half = lanes_;
    while (2 * half < end - begin) half *= 2;
    if (half >= end - begin) return end;
    float widest = -1;
    int64_t across = 0;
    for (int64_t d = 0; d < depth_; ++d) {
      float low = std::numeric_limits<float>::infinity(), high = -low;
      for (int64_t i = begin; i < end; ++i) {
        const float value = codebook_[order_[i] * depth_ + d];
        low = std::min(low, value);
        high = std::max(high, value);
      }
      if (high - low > widest) {
        widest = high - low;
        across = d;
      }
    }
    for (int64_t i = begin; i < end; ++i)
      keys_[i] = {codebook_[order_[i] * depth_ + across], order_[i]};
    std::nth_element(keys_.begin() + begin, keys_.begin() + begin + half, keys_.begin() + end);
    for (int64_t i = begin; i < end; ++i) order_[i] = keys_[i].second;
    return begin + half;
  }

  void split_to_groups(int64_t begin, int64_t end) {
    while (end - begin > lanes_) {
      const int64_t middle = split(begin, end);
      split_to_groups(begin, middle);
      begin = middle;
    }
    std::sort(order_.begin() + begin, order_.begin() + end);
  }

  void store_codes() {
    const int64_t groups = (num_codes_ + lanes_ - 1) / lanes_;
    codes_.assign(groups * depth_ * lanes_, std::numeric_limits<float>::infinity());
    index_.assign(groups * lanes_, std::numeric_limits<int32_t>::max());
    for (int64_t i = 0; i < num_codes_; ++i) {
      const int64_t group = i / lanes_, lane = i % lanes_;
      index_[i] = order_[i];
      for (int64_t d = 0; d < depth_; ++d)
        codes_[(group * depth_ + d) * lanes_ + lane] = codebook_[order_[i] * depth_ + d];
    }
  }

  void store_boxes() {
    constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
    int64_t children = (num_codes_ + lanes_ - 1) / lanes_;
    while (children > 1) {
      const int64_t groups = (children + lanes_ - 1) / lanes_;
      std::vector<float> bounds(groups * 2 * depth_ * lanes_, kNone);
      for (int64_t child = 0; child < children; ++child) {
        for (int64_t d = 0; d < depth_; ++d) {
          const auto [low, high] = extent(child, d);
          const int64_t at = child / lanes_ * 2 * depth_ * lanes_ + d * lanes_ + child % lanes_;
          bounds[at] = low;
          bounds[at + depth_ * lanes_] = high;
        }
      }
      bounds_.push_back(std::move(bounds));
      children = groups;
    }
  }

  // Smallest and largest coordinate d in group `group` of the highest level so far.
  std::pair<float, float> extent(int64_t group, int64_t d) const {
    float low = std::numeric_limits<float>::infinity(), high = -low;
    if (bounds_.empty()) {
      const int64_t end = std::min<int64_t>(num_codes_, (group + 1) * lanes_);
      for (int64_t i = group * lanes_; i < end; ++i) {
        const float value = codes_[(group * depth_ + d) * lanes_ + i % lanes_];
        low = std::min(low, value);
        high = std::max(high, value);
      }
      return {low, high};
    }
    const float* at = bounds_.back().data() + (group * 2 * depth_ + d) * lanes_;
    for (int lane = 0; lane < lanes_; ++lane) {
      // A lane without a box is NaN, and these comparisons are false for it.
      if (at[lane] < low) low = at[lane];
      if (at[depth_ * lanes_ + lane] > high) high = at[depth_ * lanes_ + lane];
    }
    return {low, high};
  }

  const float* codebook_;
  const int64_t num_codes_, depth_;
  const int lanes_;
  std::vector<int32_t> order_;
  std::vector<std::pair<float, int32_t>> keys_;
  std::vector<float> codes_;
  std::vector<int32_t> index_;
  std::vector<std::vector<float>> bounds_;
};

}  // namespace fastldm
