// The choice of the instruction set, at run time.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fp4_cpu {
namespace {

struct Choice {
  const Kernels* kernels[5];  // the best first
  int count;
  char names[64];
};

// Whether there are tiles, which Linux lets a process use once it has asked.
[[maybe_unused]] bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Choice choices() {
  Choice found = {};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16"), slow = __builtin_cpu_is("intel");  // two cycles each
  if (bf16 && may_use_amx()) found.kernels[found.count++] = &kAmx;
  if (bf16 && !slow) found.kernels[found.count++] = &kAvx512Bf16;
  if (avx512) found.kernels[found.count++] = &kAvx512;
  if (bf16 && slow) found.kernels[found.count++] = &kAvx512Bf16;
  if (avx2) found.kernels[found.count++] = &kAvx2;
#endif
  found.kernels[found.count++] = &kPortable;
  for (int i = 0; i < found.count; ++i) {
    if (i != 0) std::strcat(found.names, ", ");
    std::strcat(found.names, found.kernels[i]->name);
  }
  return found;
}

}  // namespace

const Kernels* find_kernels(const char** possible) {
  static const Choice found = choices();
  *possible = found.names;
  const char* wanted = std::getenv("HF_FP4_CPU_ISA");
  if (wanted == nullptr || *wanted == 0) return found.kernels[0];
  for (int i = 0; i < found.count; ++i)
    if (std::strcmp(wanted, found.kernels[i]->name) == 0) return found.kernels[i];
  return nullptr;
}

}  // namespace fp4_cpu
