#include "geglu/cpu.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "fastldm/geglu.h"
#include "parallel.h"
#include "tensor_memory.h"

namespace fastldm {
namespace {

using at::Tensor;

// The stride of the rows of [..., width]; -1 where they are not evenly spaced or their elements are
// no neighbours.
int64_t stride_of_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return -1;
  int64_t stride = x.size(last), rows = 1;
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    if (x.size(dim) == 1) continue;
    if (rows == 1) {
      stride = x.stride(dim);
    } else if (x.stride(dim) != stride * rows) {
      return -1;
    }
    rows *= x.size(dim);
  }
  return stride;
}

// [..., width] as rows; holds what it points to.
struct Matrix {
  Tensor tensor;
  geglu::Rows rows;

  explicit Matrix(const Tensor& x)
      : tensor(stride_of_rows(x) < 0 ? x.contiguous() : x),
        rows{source(tensor), stride_of_rows(tensor)} {}
};

void check(const Tensor& hidden_states) {
  TORCH_CHECK(hidden_states.device().is_cpu() && hidden_states.dim() > 0 &&
                  hidden_states.size(-1) > 0 && hidden_states.size(-1) % 2 == 0,
              "hidden_states: expected a CPU tensor [..., 2 D]");
  TORCH_CHECK(hidden_states.scalar_type() != at::kDouble, "hidden_states: no kernel for float64");
}

template <typename Task>
void run(const Tensor& hidden_states, Task task) {
  task.width = hidden_states.size(-1) / 2;
  const Parts parts(task.width, geglu::kPart);
  const int64_t rows = hidden_states.numel() / hidden_states.size(-1);
  run_tasks(rows * parts.count, parts.size(0), task);
}

}  // namespace

Tensor geglu_fwd(const Tensor& hidden_states) {
  check(hidden_states);
  const Matrix from(hidden_states);
  std::vector<int64_t> sizes = hidden_states.sizes().vec();
  sizes.back() /= 2;
  const Tensor y = at::empty(sizes, hidden_states.options());
  run(hidden_states, geglu::Forward{from.rows, target(y)});
  return y;
}

Tensor geglu_bwd(const Tensor& grad_y, const Tensor& hidden_states) {
  check(hidden_states);
  TORCH_CHECK(grad_y.numel() * 2 == hidden_states.numel() &&
                  grad_y.size(-1) * 2 == hidden_states.size(-1) &&
                  grad_y.scalar_type() == hidden_states.scalar_type(),
              "grad_y: expected the shape and dtype of the output");
  const Matrix from(hidden_states), upstream(grad_y);
  const Tensor gradient = at::empty(hidden_states.sizes(), hidden_states.options());
  run(hidden_states, geglu::Backward{from.rows, upstream.rows, target(gradient)});
  return gradient;
}

}  // namespace fastldm
