// Work that is compiled for several instruction sets, of which one is picked at run time.
//
// The code is told what its processor has: registers of so many bytes, and whether it fuses a
// product and a sum. With contraction off, as this library is compiled, a fused operation is one
// that the source asks for.
//
// A task may run another one in its own version. Each is a function, never inlined, so that the
// inner one has all registers for itself.
#pragma once

#include <cstdint>

#include "fastldm/inline.h"

namespace fastldm {

#if defined(__x86_64__)
#define FASTLDM_TARGET(features) __attribute__((noinline, target(features)))
#else
#define FASTLDM_TARGET(features) __attribute__((noinline))
#endif

#ifdef __FP_FAST_FMAF
constexpr bool kDefaultIsFused = true;
#else
constexpr bool kDefaultIsFused = false;
#endif

enum class InstructionSet { kDefault, kAvx2, kAvx512 };

template <InstructionSet set, int register_bytes, bool is_fused>
struct Processor {
  static constexpr InstructionSet kSet = set;
  static constexpr int kRegisterBytes = register_bytes;
  static constexpr bool kFused = is_fused;
};

template <typename Task>
__attribute__((noinline)) void run_default(const Task& task, int64_t begin, int64_t end) {
  task.template run<Processor<InstructionSet::kDefault, 16, kDefaultIsFused>>(begin, end);
}

template <typename Task>
FASTLDM_TARGET("avx2,fma")
void run_avx2(const Task& task, int64_t begin, int64_t end) {
  task.template run<Processor<InstructionSet::kAvx2, 32, true>>(begin, end);
}

template <typename Task>
FASTLDM_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
void run_avx512(const Task& task, int64_t begin, int64_t end) {
  task.template run<Processor<InstructionSet::kAvx512, 64, true>>(begin, end);
}

// Calls task.run<Processor>(begin, end), which must be FASTLDM_INLINE as all that it calls in turn,
// so that it becomes part of the version for the instruction set.
template <typename Task>
void run_for(InstructionSet set, const Task& task, int64_t begin, int64_t end) {
  switch (set) {
    case InstructionSet::kAvx512:
      return run_avx512(task, begin, end);
    case InstructionSet::kAvx2:
      return run_avx2(task, begin, end);
    case InstructionSet::kDefault:
      return run_default(task, begin, end);
  }
}

}  // namespace fastldm
