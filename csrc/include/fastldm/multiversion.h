// One function compiled for several instruction sets, of which the loader picks one at run time.
#pragma once

// It needs the dynamic linker's indirect functions. Their resolvers run before the sanitizers are
// ready, so a sanitised build has the default version alone.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#if defined(__clang__)
#if __clang_major__ >= 14 && !__has_feature(address_sanitizer)
#define FASTLDM_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#elif defined(__GNUC__)
#define FASTLDM_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif

#ifndef FASTLDM_MULTIVERSION
#define FASTLDM_MULTIVERSION
#endif

#define FASTLDM_INLINE inline __attribute__((always_inline))
