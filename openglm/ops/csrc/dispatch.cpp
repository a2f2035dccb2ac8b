// Which instruction set runs: the best one that the CPU has and the library was built with, or the one asked for.
#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "openglm.h"
#include "threads.h"

#ifdef OG_PLAIN
extern const OgKernels og_plain, og_plain16;
#endif
#ifdef OG_AVX2
extern const OgKernels og_avx2;
#endif
#ifdef OG_AVX2VNNI
extern const OgKernels og_avx2vnni;
#endif
#ifdef OG_AVX512
extern const OgKernels og_avx512;
#endif
#ifdef OG_NEON
extern const OgKernels og_neon;
#endif
#ifdef OG_NEON_DOT
extern const OgKernels og_neon_dot;
#endif
#ifdef OG_NEON_I8MM
extern const OgKernels og_neon_i8mm;
#endif

namespace openglm {
namespace {

#if defined(__aarch64__) && defined(__linux__)
bool arm_has_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }   // HWCAP_ASIMDDP
bool arm_has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; } // HWCAP2_I8MM
#elif defined(__aarch64__) && defined(__APPLE__)
bool has(const char *feature) {
  int value = 0;
  size_t size = sizeof value;
  return !sysctlbyname(feature, &value, &size, nullptr, 0) && value;
}
bool arm_has_dot() { return has("hw.optional.arm.FEAT_DotProd"); }
bool arm_has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
bool arm_has_dot() { return false; } // not asked on other systems
bool arm_has_i8mm() { return false; }
#endif

struct Choice {
  const OgKernels *kernels;
  bool usable;
};

const Choice *choices(int *n) { // best first
  static const Choice all[] = {
#ifdef OG_AVX512
      {&og_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vnni")},
#endif
#ifdef OG_AVX2VNNI
      {&og_avx2vnni, __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("fma")},
#endif
#ifdef OG_AVX2
      {&og_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
#ifdef OG_NEON_I8MM
      {&og_neon_i8mm, arm_has_dot() && arm_has_i8mm()},
#endif
#ifdef OG_NEON_DOT
      {&og_neon_dot, arm_has_dot()},
#endif
#ifdef OG_NEON
      {&og_neon, true},
#endif
#ifdef OG_PLAIN
      {&og_plain, true},
      {&og_plain16, true},
#endif
  };
  *n = sizeof all / sizeof all[0];
  return all;
}

const OgKernels *chosen = nullptr;

} // namespace

const OgKernels *kernels() {
  if (chosen) return chosen;
  int n;
  const Choice *all = choices(&n);
  for (int i = 0; i < n && !chosen; i++)
    if (all[i].usable) chosen = all[i].kernels;
  return chosen;
}

} // namespace openglm

// Name of the i-th instruction set that runs here, best first; NULL beyond the last.
OG_API const char *og_isa(int i) {
  int n;
  const openglm::Choice *all = openglm::choices(&n);
  for (int j = 0; j < n; j++)
    if (all[j].usable && i-- == 0) return all[j].kernels->name;
  return nullptr;
}

// 1 if the instruction set of that name now runs. Weights packed for another number of lanes must be packed again.
OG_API int og_use_isa(const char *name) {
  int n;
  const openglm::Choice *all = openglm::choices(&n);
  for (int j = 0; j < n; j++)
    if (all[j].usable && !strcmp(all[j].kernels->name, name)) {
      openglm::chosen = all[j].kernels;
      return 1;
    }
  return 0;
}

OG_API const char *og_isa_in_use() { return openglm::kernels()->name; }
OG_API int og_lanes() { return openglm::kernels()->lanes; }
OG_API int og_threads() { return openglm::n_threads(); }
OG_API void og_set_threads(int n) { openglm::set_threads(n); }
