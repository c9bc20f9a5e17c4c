// SPDX-License-Identifier: Apache-2.0
// Stacks and the switch between them.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) && !defined(GFL_HOST_UCONTEXT)
#define GFL_HOST_UCONTEXT 1
#endif
#if defined(GFL_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace gfl_host {

// A computation that is not running; the host's own is one too, without a stack that we made.
struct Context {
#if defined(GFL_HOST_UCONTEXT)
  ucontext_t saved{};
#else
  void* stack_pointer = nullptr;
#endif
  unsigned char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// A stack on which the first switch_context calls `entry`, which must not return. False if there is no memory.
bool create_context(Context& context, unsigned number, void (*entry)());
// The first call in `entry`.
void begin_context(Context& self);
// Returns when somebody switches back to `from`.
void switch_context(Context& from, Context& to);

}  // namespace gfl_host
