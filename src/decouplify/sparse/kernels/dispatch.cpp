#include <cstring>

#include "kernels.h"

namespace decouplify {

#if defined(__x86_64__)
namespace avx512 {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
#endif
namespace generic {
const Kernels& kernels();
}

namespace {

struct Choice {
  const Kernels& (*kernels)();
  bool (*runs_here)();
};

// Best first. On 64-bit ARM the generic variant is NEON, which every such CPU has.
constexpr Choice kChoices[] = {
#if defined(__x86_64__)
#if defined(DECOUPLIFY_EMULATE)
    {avx512::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"); }},
#else
    {avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("bmi2");
     }},
#endif
    {avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {generic::kernels, [] { return true; }},
};

}  // namespace

const Kernels* best_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this may run before the constructors that would do it
#endif
  for (const Choice& choice : kChoices) {
    if (choice.runs_here()) return &choice.kernels();
  }
  return nullptr;
}

const Kernels* kernels_named(const char* name) {
  for (const Choice& choice : kChoices) {
    if (choice.runs_here() && std::strcmp(choice.kernels().name, name) == 0) return &choice.kernels();
  }
  return nullptr;
}

}  // namespace decouplify
