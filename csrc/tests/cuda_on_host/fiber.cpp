// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include "runtime.h"

namespace gfl_host {
namespace {

#if defined(GFL_HOST_ASAN)
constexpr size_t kStackBytes = 512 * 1024;  // there are redzones around every local
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

#if !defined(GFL_HOST_UCONTEXT)
// Leaves on the old stack what the System V ABI makes a callee preserve, and takes it from the new one. swapcontext
// would make a system call besides, for the signal mask.
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  __asm__(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

[[maybe_unused]] Context* left = nullptr;  // the one that the running computation was switched to from

}  // namespace

bool create_context(Context& context, unsigned number, void (*entry)()) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* map = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (map == MAP_FAILED || mprotect(map, page, PROT_NONE) != 0) return false;
  context.stack = static_cast<unsigned char*>(map) + page;
  // Tops at different offsets in a page, or all of them share the same few sets of the cache.
  context.stack_bytes = kStackBytes - (number % 16) * 256;
#if defined(GFL_HOST_UCONTEXT)
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = context.stack;
  context.saved.uc_stack.ss_size = context.stack_bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
#else
  // As if `entry` had been called: its return address (none) lies 8 below a multiple of 16.
  void** address = reinterpret_cast<void**>(context.stack + context.stack_bytes) - 1;
  address[0] = nullptr;
  address[-1] = reinterpret_cast<void*>(entry);
  for (int saved = 2; saved <= 7; ++saved) address[-saved] = nullptr;
  context.stack_pointer = static_cast<void*>(address - 7);
#endif
  return true;
}

void begin_context([[maybe_unused]] Context& self) {
#if defined(GFL_HOST_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &bytes);
  left->stack = static_cast<unsigned char*>(const_cast<void*>(bottom));  // news for the host's context only
  left->stack_bytes = bytes;
#endif
}

void switch_context(Context& from, Context& to) {
  left = &from;
#if defined(GFL_HOST_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(GFL_HOST_UCONTEXT)
  swapcontext(&from.saved, &to.saved);
#else
  switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  begin_context(from);
}

}  // namespace gfl_host
