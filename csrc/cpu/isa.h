// SPDX-License-Identifier: Apache-2.0
// Run-time choice of the instruction set. Every file in csrc/cpu/simd is compiled once per set, which GFL_ISA names,
// and defines everything in `namespace gfl::GFL_ISA`, so that code for one is never linked for another.
#pragma once

namespace gfl::cpu {

enum class Isa { portable, avx2, avx512 };

// The widest that this processor supports; GFL_OPS_CPU_ISA=portable|avx2|avx512 selects a narrower one. Read once.
Isa isa();
const char* isa_name();

}  // namespace gfl::cpu

#if defined(GFL_HAS_X86_ISAS)
#define GFL_DECLARE_PER_ISA(declaration) \
  namespace portable { declaration; }    \
  namespace avx2 { declaration; }        \
  namespace avx512 { declaration; }
#define GFL_BY_ISA(function, ...)                                          \
  switch (gfl::cpu::isa()) {                                               \
    case gfl::cpu::Isa::avx512: return gfl::avx512::function(__VA_ARGS__); \
    case gfl::cpu::Isa::avx2: return gfl::avx2::function(__VA_ARGS__);     \
    case gfl::cpu::Isa::portable: break;                                   \
  }                                                                        \
  return gfl::portable::function(__VA_ARGS__)
#else
#define GFL_DECLARE_PER_ISA(declaration) \
  namespace portable { declaration; }
#define GFL_BY_ISA(function, ...) return gfl::portable::function(__VA_ARGS__)
#endif
