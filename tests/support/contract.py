# SPDX-License-Identifier: Apache-2.0
"""What every operator must hold, as checks of one operator on one backend and device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from gfl_ops.core.conformance import differentiated, gradients, leaves_of, outputs, tensors
from gfl_ops.core.registry import OpSpec, Sample, define_operator, reference_backward

# What numerical differences can't judge: values beyond any step, kinks, and parts that a gradient takes as constant.
UNSMOOTH = ("extreme", "tie", "detached")
NAMESPACES = {"native": "gfl", "triton": "gfl_triton"}


@dataclass(frozen=True)
class Rung:
    """An operator on one backend and device: "native", "triton", or "reference", the fallback without a kernel."""

    spec: OpSpec
    backend: str
    device: str
    namespace: str

    def __str__(self) -> str:
        return f"{self.spec.stem}-{self.backend}-{self.device}"

    @property
    def forward(self) -> Callable[..., Any]:
        return getattr(getattr(torch.ops, self.namespace), self.spec.forward_name)  # type: ignore[no-any-return]

    @property
    def backward(self) -> Callable[..., Any]:
        return getattr(getattr(torch.ops, self.namespace), self.spec.backward_name)  # type: ignore[no-any-return]

    def samples(self, dtype: torch.dtype, seed: int) -> list[Sample]:
        return list(self.spec.samples(torch.device(self.device), dtype, torch.Generator().manual_seed(seed)))

    def full_samples(self, seed: int) -> list[Sample]:
        """Those without an empty tensor, in the first dtype that the operator takes."""
        return [s for s in self.samples(self.spec.dtypes[0], seed) if all(t.numel() for t in tensors(s.args))]


def by_reference(spec: OpSpec, device: str, namespace: str) -> Rung:
    """The operator as it is defined where no kernel is compiled, in a namespace of its own."""
    define_operator(spec, namespace, spec.reference, reference_backward(spec))
    return Rung(spec, "reference", device, namespace)


def backward_arguments(spec: OpSpec, args: tuple[Any, ...], fill: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """What the backward operator takes before `needs`: gradients that `fill` makes, saved results, the arguments."""
    results = outputs(spec.reference(*args))
    grads = [tree_map(lambda t: fill(t.detach()), results[i]) for i in spec.grads]
    return (*grads, *(results[i] for i in spec.saved_outputs), *args)


def of_leaves(
    spec: OpSpec, function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The differentiable results as a function of the leaves alone, and the leaves."""
    args, leaves = leaves_of(spec, args)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        fresh = [
            tree_map(lambda _: next(given), a) if n in spec.differentiable else a for n, a in zip(spec.arguments, args)
        ]
        return tuple(differentiated(spec, function(*fresh)))

    return call, leaves


def metadata(t: Tensor) -> tuple[Any, ...]:
    """What a fake kernel has to foresee: shape, strides of the dimensions that are stepped along, dtype, device."""
    strides = tuple(s for n, s in zip(t.shape, t.stride()) if n > 1) if t.numel() else ()
    return tuple(t.shape), strides, t.dtype, t.device


def check_fake(rung: Rung, sample: Sample) -> None:
    """The fake kernels foresee the results of forward, and of backward for all `needs`."""

    def check(operator: Callable[..., Any], args: tuple[Any, ...], what: str) -> None:
        want = tensors(outputs(operator(*args)))
        with FakeTensorMode(shape_env=ShapeEnv()) as fake:
            faked = tree_map(lambda v: fake.from_tensor(v, static_shapes=True) if isinstance(v, Tensor) else v, args)
            got = tensors(outputs(operator(*faked)))
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if any(isinstance(n, torch.SymInt) for n in g.shape):  # a size that depends on the data
                foreseen = (g.dim(), g.dtype, g.device) == (w.dim(), w.dtype, w.device)
            else:
                foreseen = metadata(g) == metadata(w)
            assert foreseen, f"{what}: fake result {i} is {g}, real {metadata(w)}"

    check(rung.forward, sample.args, sample.id)
    if rung.spec.differentiable:
        given = backward_arguments(rung.spec, sample.args, torch.ones_like)
        for needs in itertools.product([True, False], repeat=len(rung.spec.differentiable)):
            if any(needs):
                check(rung.backward, (*given, list(needs)), f"{sample.id}, backward, needs {needs}")


def check_functional(rung: Rung, sample: Sample) -> None:
    """The operators change none of their arguments and return memory of their own."""

    def check(operator: Callable[..., Any], args: tuple[Any, ...], what: str) -> None:
        before = [t.clone() for t in tensors(args)]
        results = tensors(outputs(operator(*args)))
        for given, kept in zip(tensors(args), before, strict=True):
            assert torch.equal(given.nan_to_num(), kept.nan_to_num()), f"{what}: an argument is changed"
            assert not any(shares_memory(given, r) for r in results), (
                f"{what}: a result is an argument or a view of one"
            )

    check(rung.forward, sample.args, sample.id)
    if rung.spec.differentiable:
        given = backward_arguments(rung.spec, sample.args, torch.ones_like)
        check(rung.backward, (*given, [True] * len(rung.spec.differentiable)), f"{sample.id}, backward")


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def check_opcheck(rung: Rung, seed: int) -> None:
    spec, samples = rung.spec, rung.samples(rung.spec.dtypes[0], seed)
    # opcheck takes a NaN for a difference.
    samples = [s for s in samples if all(t.isfinite().all() for t in tensors(outputs(spec.reference(*s.args))))]
    # The smallest, and two others picked by the seed: opcheck traces each several times.
    picked = {s.id: s for s in (samples[0], samples[seed % len(samples)], samples[seed // 7 % len(samples)])}
    for sample in picked.values():
        args, _ = leaves_of(spec, sample.args)
        torch.library.opcheck(rung.forward.default, args)  # type: ignore[attr-defined]
        if spec.differentiable:
            given = backward_arguments(spec, sample.args, torch.ones_like)
            needs = [True] * len(spec.differentiable)
            torch.library.opcheck(rung.backward.default, (*given, needs))  # type: ignore[attr-defined]


def smooth_samples(rung: Rung, seed: int) -> list[Sample]:
    """fp64 calls that are small and smooth enough for numerical differences."""
    return [
        sample
        for sample in rung.samples(torch.float64, seed)
        if not any(word in sample.id for word in UNSMOOTH)
        and 0 < sum(leaf.numel() for leaf in leaves_of(rung.spec, sample.args)[1]) <= 600
    ]


def check_gradcheck(rung: Rung, seed: int) -> None:
    samples = smooth_samples(rung, seed)
    for sample in samples:
        call, leaves = of_leaves(rung.spec, rung.forward, sample.args)
        # Triton's interpreter takes milliseconds per call: random projections of the Jacobian there, not all entries.
        fast = rung.backend == "triton" and rung.device == "cpu"
        options = {"nondet_tol": 0.0, "check_batched_grad": False, "fast_mode": fast}
        assert torch.autograd.gradcheck(call, leaves, **options), sample.id  # type: ignore[arg-type]
    assert samples


def check_repeats(rung: Rung, sample: Sample) -> None:
    """The same bits from run to run, and with one thread as with several."""
    spec, threads, results = rung.spec, torch.get_num_threads(), []
    for count in (1, threads, 8):
        torch.set_num_threads(count)
        try:
            result = rung.forward(*sample.args)
            got = tensors(outputs(result))
            if spec.differentiable:
                grads = tuple(torch.ones_like(t) for t in differentiated(spec, result))
                got = got + gradients(spec, rung.forward, sample.args, grads)
        finally:
            torch.set_num_threads(threads)
        results.append([g.contiguous().view(-1).view(torch.uint8).clone() if g.numel() else g for g in got])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), sample.id


def check_compiles(call: Callable[..., Any], samples: list[Sample]) -> None:
    """Into one graph with dynamic shapes, and computes the same."""
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for sample in samples[:2]:
        for got, want in zip(tensors(compiled(*sample.args)), tensors(call(*sample.args)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def check_needs(rung: Rung, sample: Sample) -> None:
    """The backward operator computes the gradients that are wanted, and no other."""
    spec, given = rung.spec, backward_arguments(rung.spec, sample.args, torch.ones_like)
    for wanted in range(len(spec.differentiable)):
        needs = [i == wanted for i in range(len(spec.differentiable))]
        got = rung.backward(*given, needs)
        for needed, part in zip(needs, got if len(needs) > 1 else [got], strict=True):
            assert all((t.numel() > 0) == needed for t in tensors(part)), (needs, sample.id)
