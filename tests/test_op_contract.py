# SPDX-License-Identifier: Apache-2.0
"""What holds for every operator of the registry, on every backend, device and dtype that serves it."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.core.registry import SPECS, OpSpec, Sample

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# Rounding of a chain of a few dozen operations, each good to half an ulp, on a result of size 1 (or of the size of the
# terms that cancel in it, where the spec says so); sums over up to 129 classes or bins stay within it because their
# terms are of one sign. In fp64 the oracle is no better than what it judges, and eager's own error can't be seen.
ULPS = {torch.float32: 64, torch.float64: 512}


def cases(names: tuple[str, ...] = ("native", "triton")) -> list[Any]:
    """(spec, backend, device) that is served; what is not served here is not a case, and the doctor says why."""
    return [
        pytest.param(spec, backend, device, id=f"{spec.stem}-{backend}-{device}")
        for spec in SPECS.values()
        for backend in names
        for device in DEVICES
        if backends.unavailable(backend, spec.stem, device) is None
    ]


def dtyped_cases() -> list[Any]:
    return [
        pytest.param(*case.values, dtype, id=f"{case.id}-{DTYPE_NAMES[dtype]}")
        for case in cases()
        for dtype in case.values[0].dtypes
    ]


def drawn(spec: OpSpec, device: str, dtype: torch.dtype, seed: int) -> list[Sample]:
    return list(spec.samples(torch.device(device), dtype, torch.Generator().manual_seed(seed)))


def operator(spec: OpSpec, backend: str, direction: str = "forward") -> Callable[..., Any]:
    namespace = {"native": torch.ops.gfl, "triton": torch.ops.gfl_triton}[backend]
    return getattr(namespace, spec.forward_name if direction == "forward" else spec.backward_name)


def double(value: Any) -> Any:
    """The arguments as the oracle takes them: the rounded inputs, exactly, in fp64."""
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def outputs(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def differentiated(spec: OpSpec, result: Any) -> list[Tensor]:
    """The results that have a gradient, those in lists too."""
    return tensors([outputs(result)[i] for i in spec.grads])


def backward_arguments(spec: OpSpec, args: tuple[Any, ...], fill: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """What the backward operator takes before `needs`: gradients that `fill` makes, saved results, the arguments."""
    results = outputs(spec.reference(*args))
    grads = [tree_map(lambda t: fill(t.detach()), results[i]) for i in spec.grads]
    return (*grads, *(results[i] for i in spec.saved_outputs), *args)


def assert_close(got: Tensor, eager: Tensor, oracle: Tensor, what: str, magnitude: float = 1.0) -> None:
    """`got` errs at most twice as much as eager torch in the same dtype, or by the roundings of its own dtype."""
    assert got.shape == oracle.shape, f"{what}: shape {list(got.shape)}, expected {list(oracle.shape)}"
    assert got.dtype == eager.dtype, f"{what}: {got.dtype}, expected {eager.dtype}"
    if got.numel() == 0:
        return
    got64, eager64 = got.double(), eager.double()
    special = ~torch.isfinite(oracle) | ~torch.isfinite(eager64)
    torch.testing.assert_close(got64[special], eager64[special], equal_nan=True, rtol=0, atol=0, msg=f"{what}: special")
    got64, eager64, oracle = got64[~special], eager64[~special], oracle[~special]
    arithmetic = torch.float64 if got.dtype == torch.float64 else torch.float32
    scale = oracle.abs().clamp(min=magnitude)
    allowed = torch.maximum(2 * (eager64 - oracle).abs(), ULPS[arithmetic] * torch.finfo(arithmetic).eps * scale)
    if got.dtype in (torch.float16, torch.bfloat16):
        # The result itself is rounded once to its dtype; subnormal halves have an absolute step instead.
        info = torch.finfo(got.dtype)
        allowed = allowed + (info.eps * oracle.abs()).clamp(min=info.smallest_normal * info.eps)
    wrong = ~((got64 - oracle).abs() <= allowed)
    if wrong.any():
        worst = ((got64 - oracle).abs() / allowed).nan_to_num(float("inf")).argmax()
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, worst {got64[worst].item()!r} for "
            f"{oracle[worst].item()!r} (eager torch {eager64[worst].item()!r}, allowed {allowed[worst].item():.3g})"
        )


def leaves_of(spec: OpSpec, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The arguments with fresh leaves where the gradient reaches, and those leaves."""
    leaves: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    fresh = [
        tree_map(leaf, value) if name in spec.differentiable else value for name, value in zip(spec.arguments, args)
    ]
    return tuple(fresh), leaves


def gradients(
    spec: OpSpec, function: Callable[..., Any], args: tuple[Any, ...], grads: tuple[Tensor, ...]
) -> list[Tensor]:
    args, leaves = leaves_of(spec, args)
    # Once: gradients of two calls would be added up in the leaf's dtype.
    results = differentiated(spec, function(*args))
    found = torch.autograd.grad(results, leaves, [g.to(r.dtype) for g, r in zip(grads, results)], allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)]


def magnitude_of(spec: OpSpec, sample: Sample) -> float:
    return spec.magnitude(*sample.args) if spec.magnitude is not None else 1.0


def check_forward(spec: OpSpec, function: Callable[..., Any], sample: Sample) -> None:
    got, eager = tensors(outputs(function(*sample.args))), tensors(outputs(spec.reference(*sample.args)))
    if not spec.differentiable:
        # Decisions on fp32 geometry: an fp64 oracle would decide otherwise. The reference itself is the oracle, and is
        # held against plain loops and peers in the operator's own tests.
        for i, (g, e) in enumerate(zip(got, eager, strict=True)):
            exact = not e.is_floating_point()
            torch.testing.assert_close(
                g,
                e,
                rtol=0 if exact else 1e-5,
                atol=0 if exact else 1e-5,
                equal_nan=True,
                msg=lambda m, i=i: f"{sample.id}, result {i}: {m}",
            )
        return
    oracle = tensors(outputs(spec.reference(*double(sample.args))))
    for i, (g, e, o) in enumerate(zip(got, eager, oracle, strict=True)):
        assert_close(g, e, o, f"{sample.id}, result {i}", magnitude_of(spec, sample))


def check_backward(spec: OpSpec, function: Callable[..., Any], sample: Sample, seed: int) -> None:
    shapes = differentiated(spec, spec.reference(*sample.args))
    draw = torch.Generator().manual_seed(seed)
    # Rounded as the results are: the oracle is given the same.
    grads = tuple((torch.randn(s.shape, generator=draw) * 2).to(s.device, s.dtype) for s in shapes)
    got = gradients(spec, function, sample.args, grads)
    eager = gradients(spec, spec.reference, sample.args, grads)
    oracle = gradients(spec, spec.reference, double(sample.args), grads)
    magnitudes = [magnitude_of(spec, sample) * m for m in sum_magnitudes(spec, sample.args, shapes)]
    for i, (g, e, o, m) in enumerate(zip(got, eager, oracle, magnitudes, strict=True)):
        assert_close(g, e, o, f"{sample.id}, gradient {i}", m)


def sum_magnitudes(spec: OpSpec, args: tuple[Any, ...], results: list[Tensor]) -> list[float]:
    """For each leaf the size of what cancels in its gradient: the root of n where it sums terms of n results, of both
    signs, as a parameter's does."""
    count = sum(r.numel() for r in results)
    magnitudes: list[float] = []
    for name, value in zip(spec.arguments, args):
        if name in spec.differentiable:
            leaves = tensors(value)
            terms = count / max(sum(leaf.numel() for leaf in leaves), 1)
            magnitudes += [max(terms, 1.0) ** 0.5] * len(leaves)
    return magnitudes


@pytest.mark.parametrize(("spec", "backend", "device", "dtype"), dtyped_cases())
def test_forward_agrees_with_the_oracle(spec: OpSpec, backend: str, device: str, dtype: torch.dtype, seed: int) -> None:
    for sample in drawn(spec, device, dtype, seed):
        check_forward(spec, operator(spec, backend), sample)


@pytest.mark.parametrize(
    ("spec", "backend", "device", "dtype"), [c for c in dtyped_cases() if c.values[0].differentiable]
)
def test_gradient_agrees_with_the_oracle(
    spec: OpSpec, backend: str, device: str, dtype: torch.dtype, seed: int
) -> None:
    for sample in drawn(spec, device, dtype, seed):
        check_backward(spec, operator(spec, backend), sample, seed)


def test_a_wrong_kernel_is_caught(seed: int) -> None:
    """The comparison itself is tested: a relative error of 1e-4 in one element of loss or gradient does not pass."""
    spec = SPECS["qfl"]
    sample = next(s for s in drawn(spec, "cpu", torch.float32, seed) if s.id == "sparse-n129-c80")

    def wrong_value(*args: Any) -> Tensor:
        factor = torch.ones(args[0].shape[0])
        factor[17] += 1e-4
        return spec.reference(*args) * factor

    def wrong_gradient(*args: Any) -> Tensor:
        pred = args[0]
        return spec.reference(*args) + 1e-3 * (pred - pred.detach())[:, 3]

    with pytest.raises(AssertionError, match="1 of 129 wrong"):
        check_forward(spec, wrong_value, sample)
    check_forward(spec, wrong_gradient, sample)
    with pytest.raises(AssertionError, match="gradient 0"):
        check_backward(spec, wrong_gradient, sample, seed)


@pytest.mark.parametrize(("spec", "backend", "device"), cases())
def test_opcheck(spec: OpSpec, backend: str, device: str, seed: int) -> None:
    samples = drawn(spec, device, spec.dtypes[0], seed)
    # opcheck takes a NaN for a difference.
    samples = [s for s in samples if all(t.isfinite().all() for t in tensors(outputs(spec.reference(*s.args))))]
    # The smallest, and two others picked by the seed: opcheck traces each several times.
    picked = {s.id: s for s in (samples[0], samples[seed % len(samples)], samples[seed // 7 % len(samples)])}
    for sample in picked.values():
        args, _ = leaves_of(spec, sample.args)
        torch.library.opcheck(operator(spec, backend).default, args)
        if not spec.differentiable:
            continue
        needs = [True] * len(spec.differentiable)
        given = backward_arguments(spec, sample.args, torch.ones_like)
        torch.library.opcheck(operator(spec, backend, "backward").default, (*given, needs))


@pytest.mark.parametrize(("spec", "backend", "device"), [c for c in cases() if c.values[0].differentiable])
def test_gradcheck(spec: OpSpec, backend: str, device: str, seed: int) -> None:
    if torch.float64 not in spec.dtypes:
        pytest.skip(f"{spec.stem} does not take fp64")
    checked = 0
    for sample in drawn(spec, device, torch.float64, seed):
        args, leaves = leaves_of(spec, sample.args)
        # Numerical differences need small, smooth cases, and losses without parts that the gradient takes as constant.
        unfit = any(word in sample.id for word in ("extreme", "tie", "detached"))
        if unfit or not 0 < sum(leaf.numel() for leaf in leaves) <= 600:
            continue

        def smooth(*values: Tensor, args: tuple[Any, ...] = args) -> tuple[Tensor, ...]:
            drawn_values = iter(values)
            fresh = [
                tree_map(lambda _: next(drawn_values), a) if n in spec.differentiable else a
                for n, a in zip(spec.arguments, args)
            ]
            return tuple(differentiated(spec, operator(spec, backend)(*fresh)))

        # Triton's interpreter takes milliseconds a call: random projections of the Jacobian there, not entry by entry.
        options = {"nondet_tol": 0.0, "check_batched_grad": False, "fast_mode": backend == "triton" and device == "cpu"}
        assert torch.autograd.gradcheck(smooth, leaves, **options), sample.id
        checked += 1
    assert checked


@pytest.mark.parametrize(("spec", "backend", "device"), [c for c in cases() if c.values[0].differentiable])
def test_a_second_derivative_is_refused(spec: OpSpec, backend: str, device: str, seed: int) -> None:
    sample = next(s for s in drawn(spec, device, torch.float32, seed) if all(t.numel() for t in tensors(s.args)))
    args, leaves = leaves_of(spec, sample.args)
    result = differentiated(spec, operator(spec, backend)(*args))[0]
    first = torch.autograd.grad(result.sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(("spec", "backend", "device"), cases())
def test_it_repeats_itself_bit_for_bit(spec: OpSpec, backend: str, device: str, seed: int) -> None:
    """Run to run, and at one thread as at several."""
    threads = torch.get_num_threads()
    for sample in drawn(spec, device, torch.float32, seed):
        results = []
        for count in (1, threads, 8):
            torch.set_num_threads(count)
            try:
                result = operator(spec, backend)(*sample.args)
                got = tensors(outputs(result))
                if spec.differentiable:
                    grads = tuple(torch.ones_like(t) for t in differentiated(spec, result))
                    got = got + gradients(spec, operator(spec, backend), sample.args, grads)
            finally:
                torch.set_num_threads(threads)
            results.append([g.contiguous().view(-1).view(torch.uint8).clone() if g.numel() else g for g in got])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), sample.id


@pytest.mark.parametrize(("spec", "backend", "device"), cases())
def test_it_compiles_into_one_graph(spec: OpSpec, backend: str, device: str, seed: int) -> None:
    def call(*args: Any) -> Any:
        return spec(device, *args)

    torch._dynamo.reset()
    samples = [s for s in drawn(spec, device, torch.float32, seed) if all(t.numel() for t in tensors(s.args))]
    with gfl_ops.set_backend(backend):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
        for sample in samples[:2]:
            for got, want in zip(tensors(compiled(*sample.args)), tensors(call(*sample.args)), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("spec", "backend", "device"), cases(("native",)))
def test_the_compiled_entry_point_is_the_operator(spec: OpSpec, backend: str, device: str, seed: int) -> None:
    module = importlib.import_module("gfl_ops._C")
    for sample in drawn(spec, device, torch.float32, seed):
        got = tensors(getattr(module, f"{spec.stem}_forward")(*sample.args))
        want = tensors(operator(spec, backend)(*sample.args))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
        if not spec.differentiable:
            continue
        given = backward_arguments(spec, sample.args, lambda t: torch.full_like(t, 0.5))
        needs = [True] * len(spec.differentiable)
        got = tensors(outputs(getattr(module, f"{spec.stem}_backward")(*given, needs)))
        want = tensors(outputs(operator(spec, backend, "backward")(*given, needs)))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("spec", "backend", "device"), [c for c in cases() if c.values[0].differentiable])
def test_gradients_that_are_not_wanted_are_not_computed(spec: OpSpec, backend: str, device: str, seed: int) -> None:
    sample = next(s for s in drawn(spec, device, torch.float32, seed) if all(t.numel() for t in tensors(s.args)))
    given = backward_arguments(spec, sample.args, torch.ones_like)
    for wanted in range(len(spec.differentiable)):
        needs = [i == wanted for i in range(len(spec.differentiable))]
        got = outputs(operator(spec, backend, "backward")(*given, needs))
        got = got if len(needs) > 1 else ((got,) if isinstance(got[0], Tensor) and len(got) > 1 else got)
        for needed, part in zip(needs, got, strict=True):
            assert all((t.numel() > 0) == needed for t in tensors(part)), (needs, sample.id)


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.differentiable], ids=lambda s: s.stem)
def test_the_operator_computes_without_a_kernel(spec: OpSpec, seed: int) -> None:
    """The fallback of `gfl::` where no kernel is compiled: the reference and its vector-Jacobian product."""
    from gfl_ops.core.registry import _reference_backward

    sample = next(s for s in drawn(spec, "cpu", torch.float32, seed) if all(t.numel() for t in tensors(s.args)))
    given = backward_arguments(spec, sample.args, torch.ones_like)
    grads = tuple(tensors(given[: len(spec.grads)]))
    with torch.no_grad():
        got = tensors(_reference_backward(spec, *given, [True] * len(spec.differentiable)))
    want = gradients(spec, spec.reference, sample.args, grads)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda s: s.stem)
def test_the_spec_says_what_it_serves(spec: OpSpec) -> None:
    assert spec.summary and not spec.summary.endswith(".")
    for name in spec.public:
        function = getattr(gfl_ops, name)
        assert name in gfl_ops.__all__
        for heading in ("Args:", "Returns:", "Raises:"):
            assert heading in (function.__doc__ or ""), f"{name} has no {heading!r} in its docstring"


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.triton is not None], ids=lambda s: s.stem)
def test_its_triton_functions_exist(spec: OpSpec) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module(f"gfl_ops.triton.{spec.triton}")
    for direction in ("forward", "backward") if spec.differentiable else ("forward",):
        assert callable(getattr(module, f"{spec.stem}_{direction}", None)), direction


def test_samples_are_fresh_but_repeatable() -> None:
    def fingerprint(seed: int) -> int:
        sample = drawn(SPECS["qfl"], "cpu", torch.float32, seed)[-2]
        return zlib.crc32(sample.args[0].numpy().tobytes())

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)
