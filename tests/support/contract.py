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
from torch.autograd import forward_ad
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


def assert_same(got: Any, want: Any, what: str) -> None:
    """Two results of the same arithmetic in perhaps another order."""
    for i, (g, w) in enumerate(zip(tensors(got), tensors(want), strict=True)):
        tolerance = 512 * torch.finfo(w.dtype).eps if w.is_floating_point() else 0.0
        scale = float(w.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if w.numel() else 0.0
        text = f"{what} {i}: "
        torch.testing.assert_close(
            g, w, rtol=tolerance, atol=tolerance * (1 + scale), equal_nan=True, msg=lambda m, text=text: text + m
        )


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


# --- Layouts of memory --------------------------------------------------------------------------------------------


def _at_offset(t: Tensor) -> Tensor:
    return torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape)


def _sliced(t: Tensor) -> Tensor:
    """The inner part of a larger tensor."""
    for dim in range(t.dim()):
        edge = t.narrow(dim, 0, 1)
        t = torch.cat([edge, t, edge], dim).narrow(dim, 1, t.shape[dim])
    return t


def _stepped(t: Tensor) -> Tensor:
    return torch.stack([t, t, t], -1)[..., 1]


def _transposed(t: Tensor) -> Tensor:
    """The dimensions in memory the other way round."""
    backwards = tuple(reversed(range(t.dim())))
    return t.permute(backwards).contiguous().permute(backwards)


def _swapped(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def _windows(t: Tensor) -> Tensor:
    """Rows that overlap in memory: other values than those of `t`."""
    return t.flatten().clone().as_strided(t.shape, (1,) * t.dim())


def _expanded(*dims: int) -> Callable[[Tensor], Tensor]:
    def expand(t: Tensor) -> Tensor:
        """Equal along some dimensions: other values than those of `t`."""
        for dim in dims if dims else range(t.dim()):
            if -t.dim() <= dim < t.dim():
                t = t.narrow(dim, 0, 1).expand(t.shape)
        return t

    return expand


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": _at_offset,
    "sliced": _sliced,
    "stepped": _stepped,
    "transposed": _transposed,
    "swapped": _swapped,
    "windows": _windows,
    "expanded": _expanded(),
    "expanded rows": _expanded(0),
    "expanded columns": _expanded(-1),
    "expanded maps": _expanded(2, 3),
    "expanded channels": _expanded(1),
}


def check_layouts(rung: Rung, sample: Sample, layout: str, seed: int) -> None:
    """Whatever the strides of arguments and arriving gradients, the results are those of contiguous ones."""
    spec, draw = rung.spec, torch.Generator().manual_seed(seed)

    def arranged(value: Any) -> Any:
        # Not all of them, since operators look for strides that go together.
        skipped = torch.rand((), generator=draw) < 0.2
        return tree_map(
            lambda t: LAYOUTS[layout](t) if isinstance(t, Tensor) and t.numel() and not skipped else t, value
        )

    def contiguous(value: Any) -> Any:
        return tree_map(lambda t: t.contiguous().clone() if isinstance(t, Tensor) else t, value)

    args = tuple(arranged(value) for value in sample.args)
    plain = tuple(contiguous(value) for value in args)
    want = rung.forward(*plain)
    assert_same(outputs(rung.forward(*args)), outputs(want), f"{sample.id}, {layout}, result")
    if not spec.differentiable:
        return
    grads = [torch.randn(r.shape, generator=draw).to(r) for r in differentiated(spec, want)]
    grads = [arranged(g) for g in grads]
    found = []
    for given, of_results in ((args, grads), (plain, contiguous(grads))):
        fresh, leaves = leaves_of(spec, given)
        results = differentiated(spec, rung.forward(*fresh))
        found.append(list(torch.autograd.grad(results, leaves, of_results, materialize_grads=True)))
    assert_same(*found, f"{sample.id}, {layout}, gradient")


# --- Transforms of functions --------------------------------------------------------------------------------------


def small_samples(rung: Rung, seed: int, count: int = 2) -> list[Sample]:
    """Some finite fp32 calls without empty tensors, small enough for whole Jacobians."""
    fitting = [
        sample
        for sample in rung.full_samples(seed)
        if "extreme" not in sample.id and sum(x.numel() for x in leaves_of(rung.spec, sample.args)[1]) <= 700
    ]
    return [fitting[(seed // 11**i) % len(fitting)] for i in range(count)]


def check_transforms(rung: Rung, sample: Sample, seed: int) -> None:
    """Forward mode, torch.func and batches of gradients give what they give of the reference."""
    draw = torch.Generator().manual_seed(seed)
    call, leaves = of_leaves(rung.spec, rung.forward, sample.args)
    reference, _ = of_leaves(rung.spec, rung.spec.reference, sample.args)
    values = [x.detach() for x in leaves]
    tangents = tuple(torch.randn(x.shape, generator=draw).to(x) for x in values)
    wanted = torch.func.jvp(reference, tuple(values), tangents)
    every = tuple(range(len(values)))
    assert [t.dtype for t in wanted[1]] == [r.dtype for r in call(*values)], sample.id

    def same(got: Any, want: Any, what: str) -> None:
        assert_same(got, want, f"{sample.id}, {what}")

    same(torch.func.jvp(call, tuple(values), tangents)[1], wanted[1], "jvp")
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x.clone().requires_grad_(requires_grad), t) for x, t in zip(values, tangents)]
            found = [forward_ad.unpack_dual(r).tangent for r in call(*duals)]
        zero = [torch.zeros_like(w) if f is None else f.detach() for f, w in zip(found, wanted[1])]
        same(zero, wanted[1], f"forward_ad, requires_grad={requires_grad}")

    def total(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *x: sum((r * r).sum() for r in function(*x))  # type: ignore[return-value]

    same(torch.func.grad(total(call), every)(*values), torch.func.grad(total(reference), every)(*values), "func.grad")
    results, back = torch.func.vjp(call, *values)
    given = tuple(torch.randn(r.shape, generator=draw).to(r) for r in results)
    same(back(given), torch.func.vjp(reference, *values)[1](given), "func.vjp")

    first = lambda function: lambda *x: function(*x)[0].reshape(-1)[:40]  # noqa: E731
    same(torch.func.jacrev(first(call))(*values), torch.func.jacrev(first(reference))(*values), "jacrev")

    # Over a graph that the kernels have recorded.
    recorded = call(*leaves)
    batch = tuple(torch.randn((3, *r.shape), generator=draw).to(r) for r in recorded)
    alone = [torch.autograd.grad(recorded, leaves, [g[i] for g in batch], retain_graph=True) for i in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*alone)]
    options = {"retain_graph": True, "is_grads_batched": True}
    same(torch.autograd.grad(recorded, leaves, batch, **options), stacked, "is_grads_batched")  # type: ignore[arg-type]
    over = torch.vmap(lambda g: torch.autograd.grad(recorded, leaves, g, retain_graph=True))
    same(over(batch), stacked, "vmap over backward")

    twice = [torch.stack([x, x * 0.5]) for x in values]
    each = [torch.stack(parts) for parts in zip(*(call(*(x[i] for x in twice)) for i in range(2)))]
    same(torch.vmap(call)(*twice), each, "vmap")
