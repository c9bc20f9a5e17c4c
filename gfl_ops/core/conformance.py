# SPDX-License-Identifier: Apache-2.0
"""How a kernel is held against the reference: the same judgement in the contract tests and in `gfl_ops.self_check`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import backends
from .registry import OpSpec, Sample

# Rounding of a chain of a few dozen operations, each good to half an ulp, on a result of size 1 (or of the size of the
# terms that cancel in it, where the spec says so); sums over up to 129 classes or bins stay within it because their
# terms are of one sign. In fp64 the oracle is no better than what it judges, and eager's own error can't be seen.
ULPS = {torch.float32: 64, torch.float64: 512}


class Mismatch(AssertionError):
    """A kernel's result is further from the reference than rounding explains."""


def operator(spec: OpSpec, backend: str, direction: str = "forward") -> Callable[..., Any]:
    """The dispatcher's operator of a backend: "native" or "triton"."""
    namespace = {"native": torch.ops.gfl, "triton": torch.ops.gfl_triton}[backend]
    return getattr(namespace, spec.forward_name if direction == "forward" else spec.backward_name)


def outputs(result: Any) -> tuple[Any, ...]:
    """The results of an operator as a tuple, also where there is one."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def differentiated(spec: OpSpec, result: Any) -> list[Tensor]:
    """The results that have a gradient, those in lists too."""
    return tensors([outputs(result)[i] for i in spec.grads])


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
    """The gradients of the differentiable arguments, `grads` being those of the results."""
    return _Call(spec, function, args).gradients(grads)


class _Call:
    """One call of an operator that autograd recorded."""

    def __init__(self, spec: OpSpec, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        args, self._leaves = leaves_of(spec, args)
        results = function(*args)
        self._differentiated = differentiated(spec, results)
        self.results = [r.detach() for r in tensors(outputs(results))]

    def gradients(self, grads: tuple[Tensor, ...]) -> list[Tensor]:
        # One call: gradients of two would be added up in the leaf's dtype.
        results, leaves = self._differentiated, self._leaves
        found = torch.autograd.grad(results, leaves, [g.to(r.dtype) for g, r in zip(grads, results)], allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)]

    def drawn_gradients(self, seed: int | None) -> tuple[Tensor, ...]:
        """Gradients of the results: ones, or numbers drawn from `seed`, rounded as the results are."""
        if seed is None:
            return tuple(torch.ones_like(r) for r in self._differentiated)
        draw = torch.Generator().manual_seed(seed)
        return tuple((torch.randn(r.shape, generator=draw) * 2).to(r.device, r.dtype) for r in self._differentiated)


def check_forward(spec: OpSpec, function: Callable[..., Any], sample: Sample) -> None:
    """Raise Mismatch where the results of `function` differ from the reference's by more than rounding explains."""
    got, eager = tensors(outputs(function(*sample.args))), tensors(outputs(spec.reference(*sample.args)))
    if not spec.differentiable:
        # Decisions on fp32 geometry: an fp64 oracle would decide otherwise. The reference itself is the oracle, and is
        # held against plain loops and peers in the operator's own tests.
        for i, (g, e) in enumerate(zip(got, eager, strict=True)):
            tolerance = 1e-5 if e.is_floating_point() else 0.0
            try:
                torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance, equal_nan=True)
            except AssertionError as error:
                raise Mismatch(f"{sample.id}, result {i}: {error}") from None
        return
    oracle = tensors(outputs(spec.reference(*_double(sample.args))))
    for i, (g, e, o) in enumerate(zip(got, eager, oracle, strict=True)):
        assert_close(g, e, o, f"{sample.id}, result {i}", _magnitude(spec, sample))


def check_gradient(spec: OpSpec, function: Callable[..., Any], sample: Sample, seed: int | None) -> None:
    """The same for the results and the gradients of a differentiable operator, by `_Call.drawn_gradients`."""
    got, eager = (_Call(spec, f, sample.args) for f in (function, spec.reference))
    oracle = _Call(spec, spec.reference, _double(sample.args))
    magnitude, grads = _magnitude(spec, sample), eager.drawn_gradients(seed)
    for i, (g, e, o) in enumerate(zip(got.results, eager.results, oracle.results, strict=True)):
        assert_close(g, e, o, f"{sample.id}, result {i}", magnitude)
    magnitudes = [magnitude * m for m in _sum_magnitudes(spec, sample.args, list(grads))]
    found = (call.gradients(grads) for call in (got, eager, oracle))
    for i, (g, e, o, m) in enumerate(zip(*found, magnitudes, strict=True)):
        assert_close(g, e, o, f"{sample.id}, gradient {i}", m)


def check_one_pass(spec: OpSpec, backend: str, sample: Sample, seed: int | None) -> None:
    """The same for kernels that compute a loss with its gradient; without a seed the gradient is as they store it."""
    if spec.one_pass is None:
        return
    same = replace(spec, differentiable=spec.one_pass.differentiable)
    if spec.one_pass.summed:
        same = replace(same, reference=lambda *args: spec.reference(*args).sum())
    with backends.set_backend(backend):
        check_gradient(same, spec.one_pass.function, sample, seed)


def assert_close(got: Tensor, eager: Tensor, oracle: Tensor, what: str, magnitude: float = 1.0) -> None:
    """Raise Mismatch unless `got` errs at most twice as much as eager torch in the same dtype, or by the roundings of
    its own dtype. `oracle` is the result in fp64."""
    if got.shape != oracle.shape:
        raise Mismatch(f"{what}: shape {list(got.shape)}, expected {list(oracle.shape)}")
    if got.dtype != eager.dtype:
        raise Mismatch(f"{what}: {got.dtype}, expected {eager.dtype}")
    if got.numel() == 0:
        return
    got64, eager64 = got.double(), eager.double()
    special = ~torch.isfinite(oracle) | ~torch.isfinite(eager64)
    try:
        torch.testing.assert_close(got64[special], eager64[special], equal_nan=True, rtol=0, atol=0)
    except AssertionError as error:
        raise Mismatch(f"{what}, where it is infinite or NaN: {error}") from None
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
        raise Mismatch(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, worst {got64[worst].item()!r} for "
            f"{oracle[worst].item()!r} (eager torch {eager64[worst].item()!r}, allowed {allowed[worst].item():.3g})"
        )


def _double(value: Any) -> Any:
    """The arguments as the oracle takes them: the rounded inputs, exactly, in fp64."""
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def _magnitude(spec: OpSpec, sample: Sample) -> float:
    return spec.magnitude(*sample.args) if spec.magnitude is not None else 1.0


def _sum_magnitudes(spec: OpSpec, args: tuple[Any, ...], results: list[Tensor]) -> list[float]:
    """For each leaf the size of what cancels in its gradient: the root of n where it sums terms of n results, of both
    signs, as a parameter's does."""
    count = sum(r.numel() for r in results)
    magnitudes: list[float] = []
    for position in spec.positions:
        leaves = tensors(args[position])
        terms = count / max(sum(leaf.numel() for leaf in leaves), 1)
        magnitudes += [max(terms, 1.0) ** 0.5] * len(leaves)
    return magnitudes
