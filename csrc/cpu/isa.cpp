// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace gfl::cpu {
namespace {

Isa widest() {
#if defined(GFL_HAS_X86_ISAS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa choose() {
  const Isa found = widest();
  const char* wish = std::getenv("GFL_OPS_CPU_ISA");
  if (wish == nullptr) return found;
  const Isa wished = std::strcmp(wish, "portable") == 0 ? Isa::portable
                     : std::strcmp(wish, "avx2") == 0   ? Isa::avx2
                                                        : found;
  return wished < found ? wished : found;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::portable: break;
  }
  return "portable";
}

}  // namespace gfl::cpu
