// SPDX-License-Identifier: Apache-2.0
// The Python module gfl_ops._C. Loading it registers the operators with the dispatcher.
#include "../cpu/isa.h"
#include "operator.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_isa", &gfl::cpu::isa_name, "The instruction set that the CPU kernels use on this processor.");
  for (const auto expose : gfl::binding::EntryPoint::all()) expose(m);
}
