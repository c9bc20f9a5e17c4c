// SPDX-License-Identifier: Apache-2.0
// The compiled entry points in Python, each in two forms under one name:
//
//   gfl_ops._C.<name>         the entry point
//   gfl_ops._C.direct.<name>  the same where the dispatcher would do no more than run it, else None; True for one that
//                             returns nothing. A call costs a fifth of the dispatcher's, which on a few rows is most
//                             of an operator's time.
//
// The dispatcher has more to do where a gradient is recorded, where a mode, a transform or a profiler wants to see the
// call, and where a tensor is of a subclass or a view that has to be resolved first. Some entry points record the gradient
// themselves.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace gfl::binding {

// What a tensor and a thread may carry without changing a call of ours: none has a rule for autocast.
constexpr c10::DispatchKeySet kIgnorableKeys =
    c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect,
                         c10::DispatchKey::AutogradFunctionality}) |
    c10::DispatchKeySet(c10::BackendComponent::CPUBit) | c10::DispatchKeySet(c10::BackendComponent::CUDABit) |
    c10::autocast_dispatch_keyset;

// A copy, for torch 2.6 gives the bits of no constant.
inline uint64_t bits_of(c10::DispatchKeySet keys) { return keys.raw_repr(); }

// By the bits: a difference of key sets keeps the backends.
inline bool is_ignorable(c10::DispatchKeySet keys) { return (bits_of(keys) & ~bits_of(kIgnorableKeys)) == 0; }

inline bool dispatcher_is_passthrough() {
  return is_ignorable(c10::impl::tls_local_dispatch_key_set().included_) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::impl::torch_function_mode_enabled() &&
         !at::hasCallbacks();
}

// Whether `value` is no tensor, or one that is no more than its numbers; `recorded` admits one whose gradient is wanted.
inline bool is_plain(PyObject* value, bool recorded) {
  if (PyList_Check(value) || PyTuple_Check(value)) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
    PyObject** items = PySequence_Fast_ITEMS(value);
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!is_plain(items[i], recorded)) return false;
    }
    return true;
  }
  if (!THPVariable_CheckExact(value)) return !THPVariable_Check(value);
  const at::Tensor& t = THPVariable_Unpack(value);
  return is_ignorable(t.key_set()) && !t._fw_grad(0).defined() &&
         (recorded || !(t.requires_grad() && at::GradMode::is_enabled()));
}

// What holds a parameter's value: a vector for a view of one.
template <class T> struct Holder { using type = std::decay_t<T>; };
template <class T> struct Holder<c10::ArrayRef<T>> { using type = std::vector<T>; };
template <class T> using Held = typename Holder<T>::type;

template <class R, class... A, size_t... I>
pybind11::object call(R (*function)(A...), const pybind11::args& args, std::index_sequence<I...>) {
  const std::tuple<Held<A>...> values{pybind11::cast<Held<A>>(args[I])...};
  const auto run = [&] {
    const pybind11::gil_scoped_release released;
    return std::apply(function, values);
  };
  if constexpr (std::is_void_v<R>) {
    run();
    return pybind11::bool_(true);
  } else {
    return pybind11::cast(run());
  }
}

class Entries {
 public:
  explicit Entries(pybind11::module_& all)
      : all_(all), direct_(all.def_submodule("direct", "The entry points; None where a call is the dispatcher's.")) {}

  // `records`: the function itself records the gradient.
  template <class R, class... A> void add(const char* name, R (*function)(A...), bool records = false) {
    all_.def(name, [function](const Held<A>&... values) -> R { return function(values...); });
    direct_.def(name, [function, records](const pybind11::args& args) -> pybind11::object {
      if (args.size() != sizeof...(A) || !dispatcher_is_passthrough() || !is_plain(args.ptr(), records)) return pybind11::none();
      HANDLE_TH_ERRORS
      return call(function, args, std::index_sequence_for<A...>{});
      END_HANDLE_TH_ERRORS_PYBIND
    });
  }

 private:
  pybind11::module_ all_, direct_;
};

// Each GFL_OPERATOR adds itself here while the library loads; the Python module walks the list once.
struct EntryPoint {
  using Add = void (*)(Entries&);
  explicit EntryPoint(Add add) { all().push_back(add); }
  static std::vector<Add>& all() {
    static std::vector<Add> list;
    return list;
  }
};

}  // namespace gfl::binding
