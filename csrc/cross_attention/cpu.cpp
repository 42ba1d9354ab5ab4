#include "cross_attention/cpu.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>

#include "cross_attention/attention_kernels.h"
#include "cross_attention/heads.h"
#include "parallel.h"

namespace fastldm {
namespace {

using at::Tensor;

// So many tasks of the backward pass, each with sums of its own, are enough for any processor.
constexpr int64_t kGradientTasks = 16;

const AttentionKernels& attention_kernels() {
  static const AttentionKernels& kernels = []() -> const AttentionKernels& {
    const AttentionKernels* found = nullptr;
    if (instruction_set() == InstructionSet::kAvx512) found = avx512_attention();
    if (instruction_set() == InstructionSet::kAvx2) found = avx2_attention();
    return found ? *found : *portable_attention();
  }();
  return kernels;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v,
           const std::optional<Tensor>& key_mask) {
  TORCH_CHECK(q.device().is_cpu() && q.dim() == 4, "q: expected a CPU tensor [B, Lq, H, D]");
  TORCH_CHECK(q.scalar_type() != at::kDouble, "q: there is no kernel for float64");
  for (const Tensor* other : {&k, &v}) {
    TORCH_CHECK(other->device().is_cpu() && other->scalar_type() == q.scalar_type() &&
                    other->dim() == 4 && other->size(0) == q.size(0) &&
                    other->size(1) == k.size(1) && other->size(2) == q.size(2) &&
                    other->size(3) == q.size(3),
                "k, v: expected [B, Lk, H, D] of the dtype of q");
  }
  TORCH_CHECK(!key_mask || (key_mask->scalar_type() == at::kBool && key_mask->dim() == 2 &&
                            key_mask->size(0) == q.size(0) && key_mask->size(1) == k.size(1)),
              "key_mask: expected bool [B, Lk]");
}

// The queries of every head, so many a task.
struct Tasks {
  int64_t positions, heads, queries, per_head, count;

  Tasks(const Tensor& q, int64_t queries)
      : positions(q.size(1)),
        heads(q.size(2)),
        queries(queries),
        per_head((positions + queries - 1) / queries),
        count(q.size(0) * heads * per_head) {}

  int64_t sample(int64_t task) const { return task / per_head / heads; }
  int64_t head(int64_t task) const { return task / per_head % heads; }
  int64_t first(int64_t task) const { return task % per_head * queries; }
  int64_t last(int64_t task) const { return std::min(positions, first(task) + queries); }
};

class Forward {
 public:
  Forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Attended& attended,
          const Tensor& o)
      : attended_(attended),
        channels_(q.size(3)),
        scale_(scale),
        queries_(q, kernels_.queries, channels_, true),
        keys_(k, k.size(1), channels_, attended.is_all()),
        values_(v, v.size(1), channels_, attended.is_all()),
        outputs_(o, kernels_.queries),
        packed_keys_(uninitialised(k.size(1) * channels_ + kPackingMargin)),
        packed_values_(uninitialised(k.size(1) * channels_ + kPackingMargin)),
        scratch_(uninitialised(kernels_.scratch(channels_))) {}

  void pack(int64_t b, int64_t h) {
    count_ = attended_.count(b);
    kernels_.pack_by_key(keys_.rows(b, h, attended_), count_, channels_, packed_keys_.get());
    kernels_.pack_by_channel(values_.rows(b, h, attended_), count_, channels_,
                             packed_values_.get());
  }

  void run(int64_t b, int64_t h, int64_t first, int64_t last) {
    if (count_ == 0) {
      outputs_.zero(b, h, first, last - first);
    } else {
      kernels_.attend({packed_keys_.get(), packed_values_.get(), count_, channels_}, scale_,
                      queries_.rows(b, h, first, last - first), last - first, scratch_.get(),
                      outputs_.rows(b, h, first), outputs_.stride());
    }
    outputs_.finish(b, h, first, last - first);
  }

 private:
  const AttentionKernels& kernels_ = attention_kernels();
  const Attended& attended_;
  const int64_t channels_;
  const double scale_;
  const RowReader queries_, keys_, values_;
  const RowWriter outputs_;
  const std::unique_ptr<float[]> packed_keys_, packed_values_, scratch_;
  int64_t count_ = 0;
};

class Backward {
 public:
  Backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
           const Attended& attended, int64_t padded, const Tensor& grad_q)
      : attended_(attended),
        channels_(q.size(3)),
        padded_(padded),
        scale_(scale),
        queries_(q, kernels_.gradient_queries(1), padded, false),
        upstream_(grad, kernels_.gradient_queries(1), padded, false),
        keys_(k, k.size(1), channels_, attended.is_all()),
        values_(v, v.size(1), channels_, attended.is_all()),
        outputs_(grad_q, kernels_.gradient_queries(1)),
        packed_keys_(uninitialised(k.size(1) * channels_ + kPackingMargin)),
        packed_values_(uninitialised(k.size(1) * channels_ + kPackingMargin)),
        keys_by_channel_(uninitialised(k.size(1) * channels_ + kPackingMargin)) {}

  void pack(int64_t b, int64_t h) {
    count_ = attended_.count(b);
    const Rows keys = keys_.rows(b, h, attended_);
    kernels_.pack_by_key(keys, count_, channels_, packed_keys_.get());
    kernels_.pack_by_channel(keys, count_, channels_, keys_by_channel_.get());
    kernels_.pack_by_key(values_.rows(b, h, attended_), count_, channels_, packed_values_.get());
    if (count_) scratch_ = uninitialised(kernels_.gradient_scratch(count_, channels_));
  }

  // grad_keys and grad_values, [keys, padded] or null, are added to.
  void run(int64_t b, int64_t h, int64_t first, int64_t last, float* grad_keys,
           float* grad_values) {
    const int64_t step = kernels_.gradient_queries(std::max<int64_t>(1, count_));
    for (int64_t count; first < last; first += count) {
      count = std::min(step, last - first);
      if (count_ == 0) {
        outputs_.zero(b, h, first, count);
      } else {
        kernels_.gradients({packed_keys_.get(), packed_values_.get(), keys_by_channel_.get(),
                            count_, channels_, padded_},
                           scale_, queries_.rows(b, h, first, count).data,
                           upstream_.rows(b, h, first, count).data, count, scratch_.get(),
                           outputs_.rows(b, h, first), outputs_.stride(), grad_keys, grad_values);
      }
      outputs_.finish(b, h, first, count);
    }
  }

 private:
  const AttentionKernels& kernels_ = attention_kernels();
  const Attended& attended_;
  const int64_t channels_, padded_;
  const double scale_;
  const RowReader queries_, upstream_, keys_, values_;
  const RowWriter outputs_;
  const std::unique_ptr<float[]> packed_keys_, packed_values_, keys_by_channel_;
  std::unique_ptr<float[]> scratch_;
  int64_t count_ = 0;
};

// Queries of a task of the backward pass, by the shapes alone; its sums take no more memory than a
// few tensors like q.
int64_t queries_of_gradient_task(const Tensor& q, const Tensor& k, int64_t of_call) {
  const int64_t positions = std::max<int64_t>(1, q.size(1));
  const int64_t heads = std::max<int64_t>(1, q.size(0) * q.size(2));
  const int64_t parts = std::min(kGradientTasks / heads, 2 * positions / k.size(1));
  const int64_t each = (positions + std::max<int64_t>(1, parts) - 1) / std::max<int64_t>(1, parts);
  return (each + of_call - 1) / of_call * of_call;
}

// The sums of a head's tasks, [tasks, keys, padded].
struct Sums {
  int64_t tasks, positions, padded, channels;

  // Adds them in their order.
  void merge(const float* sums, const Attended& attended, int64_t b, int64_t h,
             const RowWriter& to) const {
    int64_t key = 0;
    for (int64_t position = 0; position < positions; ++position) {
      float* row = to.rows(b, h, position);
      to.zero(b, h, position, 1);
      if (key < attended.count(b) && attended.position(b, key) == position) {
        for (int64_t task = 0; task < tasks; ++task) {
          const float* part = sums + (task * positions + key) * padded;
          for (int64_t c = 0; c < channels; ++c) row[c] += part[c];
        }
        ++key;
      }
      to.finish(b, h, position, 1);
    }
  }
};

}  // namespace

Tensor cross_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                           const std::optional<Tensor>& key_mask) {
  check(q, k, v, key_mask);
  const Tensor o = at::empty(q.sizes(), q.options());
  const Attended attended(key_mask, k.size(1));
  const Tasks tasks(q, attention_kernels().queries);
  const int64_t work = tasks.queries * k.size(1) * q.size(3) / 16;
  for_each_range(tasks.count, work, [&](int64_t begin, int64_t end) {
    Forward forward(q, k, v, scale, attended, o);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = tasks.sample(task), h = tasks.head(task);
      if (task == begin || tasks.first(task) == 0) forward.pack(b, h);
      forward.run(b, h, tasks.first(task), tasks.last(task));
    }
  });
  return o;
}

std::tuple<Tensor, Tensor, Tensor> cross_attention_bwd(const Tensor& grad, const Tensor& q,
                                                       const Tensor& k, const Tensor& v,
                                                       double scale,
                                                       const std::optional<Tensor>& key_mask,
                                                       const std::vector<bool>& wanted) {
  check(q, k, v, key_mask);
  TORCH_CHECK(grad.sizes() == q.sizes() && grad.scalar_type() == q.scalar_type(),
              "grad: expected the shape and dtype of q");
  const auto empty_like = [](const Tensor& tensor, bool is_wanted) {
    return is_wanted ? at::empty(tensor.sizes(), tensor.options())
                     : at::empty({0}, tensor.options());
  };
  const Tensor grad_q = empty_like(q, wanted[0]), grad_k = empty_like(k, wanted[1]),
               grad_v = empty_like(v, wanted[2]);
  const AttentionKernels& kernels = attention_kernels();
  const Attended attended(key_mask, k.size(1));
  const int64_t channels = q.size(3), lanes = kernels.lanes;
  const int64_t padded = (channels + lanes - 1) / lanes * lanes, of_keys = k.size(1) * padded;
  const Tasks tasks(q, queries_of_gradient_task(q, k, kernels.queries));
  // Of each task, [Lk, padded]: the sums over its queries that are the keys' and the values'.
  const auto of_k = uninitialised(wanted[1] ? tasks.count * of_keys : 0);
  const auto of_v = uninitialised(wanted[2] ? tasks.count * of_keys : 0);
  const auto part = [&](const std::unique_ptr<float[]>& sums, bool is_wanted, int64_t task) {
    return is_wanted ? sums.get() + task * of_keys : nullptr;
  };
  const int64_t work = tasks.queries * k.size(1) * channels / 8;
  for_each_range(tasks.count, work, [&](int64_t begin, int64_t end) {
    Backward backward(grad, q, k, v, scale, attended, padded, grad_q);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = tasks.sample(task), h = tasks.head(task);
      float *keys = part(of_k, wanted[1], task), *values = part(of_v, wanted[2], task);
      if (keys) std::fill_n(keys, of_keys, 0.0f);
      if (values) std::fill_n(values, of_keys, 0.0f);
      if (task == begin || tasks.first(task) == 0) backward.pack(b, h);
      backward.run(b, h, tasks.first(task), tasks.last(task), keys, values);
    }
  });
  const int64_t heads = q.size(0) * tasks.heads;
  for_each_range(heads, tasks.per_head * of_keys, [&](int64_t begin, int64_t end) {
    const RowWriter to_k(grad_k, 1), to_v(grad_v, 1);
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / tasks.heads, h = head % tasks.heads, first = head * tasks.per_head;
      const Sums sums{tasks.per_head, k.size(1), padded, channels};
      if (wanted[1]) sums.merge(part(of_k, true, first), attended, b, h, to_k);
      if (wanted[2]) sums.merge(part(of_v, true, first), attended, b, h, to_v);
    }
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace fastldm
