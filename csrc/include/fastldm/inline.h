// For what is to become part of its caller, above all of a version for one instruction set.
#pragma once

#define FASTLDM_INLINE inline __attribute__((always_inline))
