# SPDX-License-Identifier: Apache-2.0
"""The registry: one `OpSpec` per operator, from which everything general about operators is derived.

`register` turns a spec into up to three operators with one schema:

- ``gfl::<name>``: compiled CPU and CUDA kernels where they exist; elsewhere the reference, so that it always runs.
- ``gfl_triton::<name>``: Triton kernels, for the operators that have them.
- the reference itself: plain PyTorch with ordinary autograd for a differentiable operator; for the others
  ``gfl_reference::<name>``, opaque to the compiler because its control flow depends on data.

`<name>` is ``<stem>_fwd``, with a ``<stem>_bwd`` beside it, for a differentiable operator, else ``<stem>``. Contract
tests, benchmarks, the doctor and the table in docs/operators.md all read `SPECS`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import backends, extension, transforms


@dataclass(frozen=True)
class Sample:
    """One random call of an operator: a readable id and the schema's arguments in order."""

    id: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class OnePass:
    """What the public function runs where a gradient is wanted: a forward pass that writes it (grad_in_forward.py).

    Attributes:
        function: the schema's arguments -> the operator's results; its first result's sum if `summed`.
        differentiable: names of the arguments that the gradient reaches.
        summed: the function returns one number.
    """

    function: Callable[..., Any]
    differentiable: tuple[str, ...]
    summed: bool = False


Samples = Callable[[torch.device, torch.dtype, torch.Generator], Iterator[Sample]]


@dataclass(frozen=True)
class OpSpec:
    """Everything there is to know about one operator.

    Attributes:
        stem: the operator's name everywhere.
        schema: arguments and results as the dispatcher writes them, without the name and without defaults.
        reference: plain PyTorch with the schema's arguments; the oracle. Computes in fp32 (fp64 for fp64 input).
        fake: the results' shapes, dtypes and strides from the arguments' alone.
        samples: (device, dtype, generator) -> new small calls for the contract tests, edge cases among them.
        large: the same for the self-check: over the sizes from which kernels take another path.
        summary: one line for tables.
        public: names of the public functions that call this operator.
        differentiable: names of the arguments that the gradient reaches.
        grad_outputs: which results have a gradient; all by default.
        saved_outputs: which of the others the backward operator is given, to spare it the work.
        dtypes: dtypes of the main input that the operator takes.
        triton: the module of gfl_ops/triton that holds ``<stem>_forward`` and, for a differentiable operator,
            ``<stem>_backward``; None if there is no Triton kernel.
        one_pass: what computes loss and gradient at once, for a loss that has such kernels.
        magnitude: (arguments) -> size of the terms that cancel within a result or gradient, 1 by default; tests
            measure their tolerance in ulps of it.
        arguments: the names of the schema's arguments.
        results: how many results the schema has.
    """

    stem: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Samples
    summary: str
    public: tuple[str, ...]
    differentiable: tuple[str, ...] = ()
    grad_outputs: tuple[int, ...] | None = None
    saved_outputs: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    triton: str | None = None
    large: Samples = lambda *_: iter(())
    one_pass: OnePass | None = None
    magnitude: Callable[..., float] | None = None
    arguments: tuple[str, ...] = field(init=False)
    results: int = field(init=False)

    def __post_init__(self) -> None:
        parsed = torch._C.parse_schema(f"gfl::{self.stem}{self.schema}")
        object.__setattr__(self, "arguments", tuple(a.name for a in parsed.arguments))
        object.__setattr__(self, "results", len(parsed.returns))

    @property
    def forward_name(self) -> str:
        return f"{self.stem}_fwd" if self.differentiable else self.stem

    @property
    def backward_name(self) -> str:
        return f"{self.stem}_bwd"

    def triton_kernel(self, direction: str) -> Callable[..., Any] | None:
        """The function of the Triton kernel for "forward" or "backward", which imports Triton when it is called."""
        return None if self.triton is None else triton_kernel(self.triton, f"{self.stem}_{direction}")

    @property
    def grads(self) -> tuple[int, ...]:
        """Which results have a gradient."""
        return tuple(range(self.results)) if self.grad_outputs is None else self.grad_outputs

    @property
    def positions(self) -> tuple[int, ...]:
        """Where the differentiable arguments stand in the schema."""
        return tuple(self.arguments.index(name) for name in self.differentiable)

    @property
    def backward_schema(self) -> str:
        """(gradients of results, saved results, the forward's arguments, needs) -> a gradient per differentiable
        argument; `needs` says which of them are wanted."""
        parsed = torch._C.parse_schema(f"gfl::{self.stem}{self.schema}")

        def kind(value: Any) -> str:
            return "Tensor[]" if str(value.type) == "List[Tensor]" else "Tensor"

        inner = self.schema[1 : self.schema.rindex(") ->")]
        given = [f"{kind(parsed.returns[i])} grad_{i}" for i in self.grads]
        given += [f"{kind(parsed.returns[i])} result_{i}" for i in self.saved_outputs]
        results = [kind(parsed.arguments[position]) for position in self.positions]
        returned = results[0] if len(results) == 1 else f"({', '.join(results)})"
        return f"({', '.join(given)}, {inner}, bool[{len(results)}] needs) -> {returned}"

    @property
    def backward_leading(self) -> int:
        """How many arguments of the backward operator come before the forward's own."""
        return len(self.grads) + len(self.saved_outputs)

    def __call__(self, device_type: str, *args: Any) -> Any:
        """Run the operator on the current backend."""
        backend = backends.serving(self.stem, device_type)
        if backend == "reference":
            if self.differentiable:
                return self.reference(*args)
            return getattr(torch.ops.gfl_reference, self.forward_name)(*args)
        operator = getattr(torch.ops.gfl if backend == "native" else torch.ops.gfl_triton, self.forward_name)
        if not self.differentiable or _is_watched(args):
            return operator(*args)
        # Its autograd kernel is Python, which takes 4 microseconds to find that there is nothing to record.
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether autograd records a call, or a transform, a tracer or a compiler sees it."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or transforms.active():
        return True
    if not torch.is_grad_enabled():
        return False
    for value in args:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) and v.requires_grad for v in value):
            return True
    return False


SPECS: dict[str, OpSpec] = {}

_DEVICES = ("CPU", "CUDA")


class _Library(torch.library.Library):
    """Operators of one namespace, whose autograd kernels leave tangents and transforms to another function."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace, "FRAGMENT")
        self.under_transforms: dict[str, Callable[..., Any]] = {}

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        instead = self.under_transforms.get(op_name) if dispatch_key == "Autograd" else None
        if instead is None:
            super().impl(op_name, fn, dispatch_key, **options)
            return

        active = transforms.active

        def kernel(keyset: Any, *args: Any) -> Any:
            return instead(*args) if active() else fn(keyset, *args)

        super().impl(op_name, kernel, dispatch_key, **options)


_library = functools.cache(_Library)


def register(spec: OpSpec) -> OpSpec:
    """Define the spec's operators and declare which backends can run them. Returns the spec."""
    SPECS[spec.stem] = spec
    native = [device for device in _DEVICES if extension.serves(spec.forward_name, device.lower())]
    triton = spec.triton_kernel("forward")
    backends.declare(spec.stem, [device.lower() for device in native], triton is not None)

    without_kernel = tuple(device for device in _DEVICES if device not in native)
    reference = spec.reference if spec.differentiable else transforms.without_derivatives(spec.reference)
    define_operator(spec, "gfl", reference, reference_backward(spec), without_kernel)
    if not spec.differentiable:
        define_operator(spec, "gfl_reference", reference)
    if triton is not None:
        define_operator(spec, "gfl_triton", triton, spec.triton_kernel("backward"))
    return spec


def define_operator(
    spec: OpSpec,
    namespace: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    devices: tuple[str, ...] = _DEVICES,
) -> None:
    """Define ``<namespace>::<name>`` with the given kernels on `devices`, and its gradient if the spec has one."""
    define(spec.forward_name, spec.schema, spec.fake, namespace, forward, devices)
    operator = getattr(getattr(torch.ops, namespace), spec.forward_name)
    torch.library.register_vmap(
        f"{namespace}::{spec.forward_name}", transforms.each_item(operator), lib=_library(namespace)
    )
    if spec.differentiable and backward is not None:
        define(spec.backward_name, spec.backward_schema, _fake_backward(spec), namespace, backward, devices)
        _differentiate(namespace, spec)


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    namespace: str = "gfl",
    kernel: Callable[..., Any] | None = None,
    devices: tuple[str, ...] = _DEVICES,
) -> None:
    """Define one operator. Without `kernel`, its kernels are those that the compiled extension registered."""
    library = _library(namespace)
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    for device in devices if kernel is not None else ():
        library.impl(name, kernel, device)


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """A function of gfl_ops/triton, whose module is imported at the first call, not with the package."""

    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(f"gfl_ops.triton.{module}"), function)(*args)

    return kernel


def reference_backward(spec: OpSpec) -> Callable[..., Any]:
    """The backward operator's kernel where nothing faster exists: autograd of the reference."""

    def kernel(*args: Any) -> Any:
        grads, arguments, needs = args[: len(spec.grads)], args[spec.backward_leading : -1], args[-1]
        results = [_empty_gradient(arguments[position], needed) for position, needed in zip(spec.positions, needs)]
        # The dispatcher switches autograd off before it runs a kernel.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.no_grad():
            found = reference_gradients(spec, grads, arguments, needs)
        # Copied, because a gradient may be a view, or the tensor that arrived, which an operator must not return.
        for result, gradient in zip(results, found):
            for memory, value in zip(_flat(result), _flat(gradient)) if gradient is not None else ():
                memory.copy_(value)
        return results[0] if len(results) == 1 else tuple(results)

    return kernel


def reference_gradients(
    spec: OpSpec, grads: Sequence[Any], arguments: Sequence[Any], needs: Sequence[bool]
) -> list[Any]:
    """The reference's gradients at the differentiable arguments, None where one is not needed."""
    wanted = [position for position, needed in zip(spec.positions, needs) if needed]

    def results_of(*leaves: Tensor) -> list[Tensor]:
        given, rest = list(arguments), iter(leaves)
        for position in wanted:
            given[position] = tree_map(lambda _: next(rest), given[position])
        results = spec.reference(*given)
        return _flat([results[i] for i in spec.grads] if isinstance(results, tuple) else results)

    found = iter(transforms.pull_back(results_of, _flat([arguments[p] for p in wanted]), _flat(grads)))
    return [
        tree_map(lambda _: next(found), arguments[position]) if needed else None
        for position, needed in zip(spec.positions, needs)
    ]


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [x for part in value for x in _flat(part)]


def _empty_gradient(value: Any, needed: bool) -> Any:
    """Memory for the gradient of an argument; an empty tensor stands in for one that is not needed."""
    if not isinstance(value, Tensor):
        # Lists hold maps, whose gradients keep their memory format.
        return [torch.empty_like(v) if needed else v.new_empty((0,)) for v in value]
    return value.new_empty(value.shape if needed else (0,))


def _fake_backward(spec: OpSpec) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        arguments, needs = args[spec.backward_leading : -1], args[-1]
        results = [_empty_gradient(arguments[position], needed) for position, needed in zip(spec.positions, needs)]
        return results[0] if len(results) == 1 else tuple(results)

    return fake


def _differentiate(namespace: str, spec: OpSpec) -> None:
    """Make the backward operator the gradient of the forward one, and refuse to differentiate it."""
    backward_op, positions = getattr(getattr(torch.ops, namespace), spec.backward_name), spec.positions

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
        constant = [r for i, r in enumerate(results) if i not in spec.grads]
        ctx.mark_non_differentiable(*(t for r in constant for t in (r if isinstance(r, (list, tuple)) else [r])))

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
        given = [grads[i] for i in spec.grads]
        if transforms.active_in_backward():
            results = reference_gradients(spec, given, arguments[len(spec.saved_outputs) :], needs)
        else:
            results = backward_op(*given, *arguments, needs)
            results = results if len(needs) > 1 else [results]
        arguments = arguments[len(spec.saved_outputs) :]
        gradients: list[Any] = [None] * len(arguments)
        for position, result, want, needed in zip(positions, results, wanted, needs):
            if needed:
                gradients[position] = result
            elif isinstance(want, (list, tuple)):
                gradients[position] = [None] * len(want)
        return tuple(gradients)

    def second(*_: Any) -> None:
        raise NotImplementedError(
            f"{namespace}::{spec.forward_name} has no second derivative; gfl_ops.set_backend('reference') has one"
        )

    library = _library(namespace)
    library.under_transforms |= {spec.forward_name: spec.reference, spec.backward_name: second}
    torch.library.register_autograd(
        f"{namespace}::{spec.forward_name}", backward, setup_context=setup_context, lib=library
    )
    torch.library.register_autograd(f"{namespace}::{spec.backward_name}", second, lib=library)
