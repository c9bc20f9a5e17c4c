// SPDX-License-Identifier: Apache-2.0
// The Python module gfl_ops._C: each compiled entry point under its own name, one line an operator. Loading it also
// registers the kernels with the dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "ops.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace gfl::binding;
  m.def("qfl_forward", &qfl_forward);
  m.def("qfl_backward", &qfl_backward);
}
