// Tasks over torch's threads, compiled for the processor at hand.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "fastldm/versioned_task.h"

namespace fastldm {

// As torch chooses for its own kernels, so that ATEN_CPU_CAPABILITY decides here, too.
inline InstructionSet instruction_set() {
  static const InstructionSet set = [] {
    const std::string name = at::get_cpu_capability();
    if (name == "AVX512") return InstructionSet::kAvx512;
    return name == "AVX2" ? InstructionSet::kAvx2 : InstructionSet::kDefault;
  }();
  return set;
}

// Elements that are worth a thread of their own.
constexpr int64_t kElementsPerThread = 1 << 14;

// Calls f(begin, end) for ranges of the tasks 0 to count - 1, each of about so many elements. No
// result may depend on which thread has a task.
template <typename F>
void for_each_range(int64_t count, int64_t elements_each, const F& f) {
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_each));
  at::parallel_for(0, count, grain, f);
}

// The same for a task of versioned_task.h.
template <typename Task>
void run_tasks(int64_t count, int64_t elements_each, const Task& task) {
  for_each_range(count, elements_each,
                 [&](int64_t begin, int64_t end) { run_for(instruction_set(), task, begin, end); });
}

}  // namespace fastldm
