# SPDX-License-Identifier: Apache-2.0
"""The registry: one `OpSpec` an operator, from which everything that is said of operators in general is made.

`register` turns a spec into three things with one schema:

- ``gfl::<name>``: the operator of the dispatcher. Compiled CPU and CUDA kernels serve it where they exist; elsewhere it
  computes by the reference, so that it can always be called.
- ``gfl_triton::<name>``: the same by Triton kernels, for the operators that have them.
- the reference itself: plain PyTorch with ordinary autograd, for differentiable operators; for the others
  ``gfl_reference::<name>``, opaque to the compiler because its control flow depends on data.

`<name>` is ``<stem>_fwd`` with a ``<stem>_bwd`` beside it for a differentiable operator, else ``<stem>``. Contract
tests, benchmarks, the doctor and the table in the README all read `SPECS`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends, extension


@dataclass(frozen=True)
class Sample:
    """One drawn call of an operator: a readable id and the schema's arguments in order."""

    id: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class OpSpec:
    """Everything there is to know of one operator.

    Attributes:
        stem: the operator's name in every folder.
        schema: arguments and results as the dispatcher writes them, without the name and without defaults.
        reference: plain PyTorch with the schema's arguments; the oracle. Computes in fp32 (fp64 for fp64 input).
        fake: results' shapes and dtypes from the arguments' alone.
        samples: (device, dtype, generator) -> fresh small calls for the contract tests, edge cases among them.
        summary: one line for tables.
        public: names of the public functions that this operator serves.
        differentiable: names of the arguments that the gradient reaches.
        grad_outputs: which results have a gradient; all by default.
        saved_outputs: which of the others the backward operator is given, to spare it the work.
        dtypes: dtypes of the main input that the operator takes.
        triton: the module of gfl_ops/triton that holds ``<stem>_forward`` and, for a differentiable operator,
            ``<stem>_backward``; None if there is no Triton kernel.
        magnitude: (arguments) -> size of the terms that cancel within a result or gradient, 1 by default; a test's
            tolerance in ulps counts from it.
    """

    stem: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype, torch.Generator], Iterator[Sample]]
    summary: str
    public: tuple[str, ...]
    differentiable: tuple[str, ...] = ()
    grad_outputs: tuple[int, ...] | None = None
    saved_outputs: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    triton: str | None = None
    magnitude: Callable[..., float] | None = None
    arguments: tuple[str, ...] = field(init=False)
    results: int = field(init=False)
    _native: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parsed = torch._C.parse_schema(f"gfl::{self.stem}{self.schema}")
        object.__setattr__(self, "arguments", tuple(a.name for a in parsed.arguments))
        object.__setattr__(self, "results", len(parsed.returns))
        native = extension.eager_bypass(f"{self.stem}_forward", self.forward_name)
        object.__setattr__(self, "_native", native)

    @property
    def forward_name(self) -> str:
        return f"{self.stem}_fwd" if self.differentiable else self.stem

    @property
    def backward_name(self) -> str:
        return f"{self.stem}_bwd"

    def triton_kernel(self, direction: str) -> Callable[..., Any] | None:
        """The function of the Triton kernel for "forward" or "backward", which imports Triton when it is called."""
        if self.triton is not None:
            return triton_kernel(self.triton, f"{self.stem}_{direction}")
        # A module per operator, of families that have not been merged yet.
        return triton_kernel(self.stem, direction) if (_TRITON_FOLDER / f"{self.stem}.py").exists() else None

    @property
    def grads(self) -> tuple[int, ...]:
        return tuple(range(self.results)) if self.grad_outputs is None else self.grad_outputs

    @property
    def backward_schema(self) -> str:
        """(gradients of the results, saved results, the forward's arguments, which gradients are wanted) -> one a
        differentiable."""
        parsed = torch._C.parse_schema(f"gfl::{self.stem}{self.schema}")

        def kind(value: Any) -> str:
            return "Tensor[]" if str(value.type) == "List[Tensor]" else "Tensor"

        types = {a.name: kind(a) for a in parsed.arguments}
        inner = self.schema[1 : self.schema.rindex(") ->")]
        given = [f"{kind(parsed.returns[i])} grad_{i}" for i in self.grads]
        given += [f"{kind(parsed.returns[i])} result_{i}" for i in self.saved_outputs]
        results = [types[name] for name in self.differentiable]
        returned = results[0] if len(results) == 1 else f"({', '.join(results)})"
        return f"({', '.join(given)}, {inner}, bool[{len(results)}] needs) -> {returned}"

    @property
    def backward_leading(self) -> int:
        """How many arguments of the backward operator come before the forward's own."""
        return len(self.grads) + len(self.saved_outputs)

    def __call__(self, device_type: str, *args: Any) -> Any:
        """Run the operator by the backend that is set."""
        backend = backends.serving(self.stem, device_type)
        if backend == "native":
            return self._native(*args)
        if backend == "triton":
            return getattr(torch.ops.gfl_triton, self.forward_name)(*args)
        if self.differentiable:
            return self.reference(*args)
        return getattr(torch.ops.gfl_reference, self.forward_name)(*args)


SPECS: dict[str, OpSpec] = {}

_LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in ("gfl", "gfl_triton", "gfl_reference")}
_TRITON_FOLDER = Path(__file__).parent.with_name("triton")


def register(spec: OpSpec) -> OpSpec:
    """Define the spec's operators and say which backends serve them. Returns the spec."""
    SPECS[spec.stem] = spec
    native = [d for d in ("cpu", "cuda") if extension.serves(spec.forward_name, d)]
    triton = spec.triton_kernel("forward")
    backends.declare(spec.stem, native, triton is not None)

    _define("gfl", spec.forward_name, spec.schema, spec.fake, _without_kernel(native), spec.reference)
    if not spec.differentiable:
        _define("gfl_reference", spec.stem, spec.schema, spec.fake, ("CPU", "CUDA"), spec.reference)
    if triton is not None:
        _define("gfl_triton", spec.forward_name, spec.schema, spec.fake, ("CPU", "CUDA"), triton)
    if spec.differentiable:
        _differentiate("gfl", spec, _without_kernel(native), lambda *args: _reference_backward(spec, *args))
        if backward := spec.triton_kernel("backward"):
            _differentiate("gfl_triton", spec, ("CPU", "CUDA"), backward)
    return spec


def _without_kernel(native: list[str]) -> tuple[str, ...]:
    return tuple(d.upper() for d in ("cpu", "cuda") if d not in native)


def _define(
    namespace: str,
    name: str,
    schema: str,
    fake: Callable[..., Any],
    keys: tuple[str, ...],
    kernel: Callable[..., Any],
) -> None:
    library = _LIBRARIES[namespace]
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    for key in keys:
        library.impl(name, kernel, key)


def define(
    name: str, schema: str, fake: Callable[..., Any], namespace: str = "gfl", kernel: Callable[..., Any] | None = None
) -> None:
    """An operator that stands beside those of the registry; its kernels are the compiled extension's, or `kernel`."""
    _define(namespace, name, schema, fake, () if kernel is None else ("CPU", "CUDA"), kernel or fake)


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """A function of gfl_ops/triton, which is imported at the first call, not with the package."""

    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(f"gfl_ops.triton.{module}"), function)(*args)

    return kernel


def _reference_backward(spec: OpSpec, *args: Any) -> Any:
    """The backward operator where no kernel serves it: the reference's own vector-Jacobian product."""
    grads, arguments, needs = args[: len(spec.grads)], list(args[spec.backward_leading : -1]), args[-1]
    positions = [spec.arguments.index(n) for n, needed in zip(spec.differentiable, needs) if needed]

    def of_differentiable(*values: Any) -> Any:
        for position, value in zip(positions, values):
            arguments[position] = value
        results = spec.reference(*arguments)
        return tuple(results[i] for i in spec.grads) if isinstance(results, tuple) else results

    # torch.func records a graph although the dispatcher has switched autograd off by the time a kernel runs.
    vjp = torch.func.vjp(of_differentiable, *(arguments[p] for p in positions))[1]
    computed = iter(vjp(grads if spec.results > 1 else grads[0]))
    results: list[Any] = []
    for name, needed in zip(spec.differentiable, needs):
        value = arguments[spec.arguments.index(name)]
        gradient = next(computed) if needed else None
        if isinstance(value, Tensor):
            results.append(_nothing(value) if gradient is None else gradient)
        elif gradient is None:
            results.append([_nothing(v) for v in value])
        else:
            results.append([torch.empty_like(v).copy_(g) for v, g in zip(value, gradient)])
    return results[0] if len(results) == 1 else tuple(results)


def _nothing(like: Tensor) -> Tensor:
    """Stands for a gradient that is not wanted."""
    return like.new_empty((0,))


def _fake_backward(spec: OpSpec) -> Callable[..., Any]:
    def gradient(value: Any, needed: bool) -> Any:
        if isinstance(value, Tensor):
            return value.new_empty(value.shape) if needed else _nothing(value)
        # Lists are of maps, whose gradients keep their memory format.
        return [torch.empty_like(v) if needed else _nothing(v) for v in value]

    def fake(*args: Any) -> Any:
        arguments, needs = args[spec.backward_leading : -1], args[-1]
        results = [gradient(arguments[spec.arguments.index(n)], w) for n, w in zip(spec.differentiable, needs)]
        return results[0] if len(results) == 1 else tuple(results)

    return fake


def _differentiate(namespace: str, spec: OpSpec, keys: tuple[str, ...], kernel: Callable[..., Any]) -> None:
    """Define the backward operator and tie it to the forward one."""
    library = _LIBRARIES[namespace]
    _define(namespace, spec.backward_name, spec.backward_schema, _fake_backward(spec), keys, kernel)
    backward_op = getattr(getattr(torch.ops, namespace), spec.backward_name)
    positions = [spec.arguments.index(n) for n in spec.differentiable]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Tensors go through save_for_backward, where the engine watches them; the rest is plain Python.
        results = output if isinstance(output, tuple) else (output,)
        tensors: list[Tensor] = []
        layout: list[Any] = []
        for value in (*(results[i] for i in spec.saved_outputs), *inputs):
            if isinstance(value, Tensor):
                layout.append(("tensor", 1))
                tensors.append(value)
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                layout.append(("tensors", len(value)))
                tensors.extend(value)
            else:
                layout.append(("constant", value))
        ctx.save_for_backward(*tensors)
        ctx.layout = layout
        without = [r for i, r in enumerate(results) if i not in spec.grads]
        ctx.mark_non_differentiable(*(t for r in without for t in (r if isinstance(r, (list, tuple)) else [r])))

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        arguments: list[Any] = []
        for kind, value in ctx.layout:
            if kind == "constant":
                arguments.append(value)
            else:
                arguments.append(saved[0] if kind == "tensor" else saved[:value])
                del saved[:value]
        wanted = [ctx.needs_input_grad[p] for p in positions]
        needs = [any(w) if isinstance(w, (list, tuple)) else w for w in wanted]
        results = backward_op(*(grads[i] for i in spec.grads), *arguments, needs)
        if len(positions) == 1:
            results = (results,)
        arguments = arguments[len(spec.saved_outputs) :]
        gradients: list[Any] = [None] * len(arguments)
        for position, result, needed in zip(positions, results, needs):
            if needed:
                gradients[position] = result
            elif isinstance(wanted[positions.index(position)], (list, tuple)):
                gradients[position] = [None] * len(arguments[position])
        return tuple(gradients)

    def second(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{namespace}::{spec.forward_name} has no second derivative; gfl_ops.set_backend('reference') has one"
        )

    forward_name = f"{namespace}::{spec.forward_name}"
    torch.library.register_autograd(forward_name, backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"{namespace}::{spec.backward_name}", second, lib=library)
