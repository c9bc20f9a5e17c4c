# SPDX-License-Identifier: Apache-2.0
"""Whatever is passed to a public function, all backends give the same: a result, or an error that names it."""

from __future__ import annotations

import importlib.util
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import tensors
from torch import Tensor
from torch.autograd import forward_ad

import gfl_ops
from gfl_ops import functional
from gfl_ops.core.registry import SPECS


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


operator_calls = _beside("operator_calls")

BACKENDS = ("reference", "auto")
FUNCTIONS = list(operator_calls.valid_calls(0))
# Where a decision hangs on the last bit of an exponential.
DECIDING = ("nms", "batched_nms", "soft_nms", "multiclass_nms", "postprocess", "atss_assign")


def outcome(name: str, call: dict[str, Any]) -> Any:
    """What comes back, or the error; anything but a named error of ours is one of the test."""
    try:
        return getattr(gfl_ops, name)(**call)
    except (TypeError, ValueError, NotImplementedError) as error:
        text = str(error)
        named = text.startswith(("gfl_ops.", "avg_factor can not"))
        assert named, f"{type(error).__name__} without the function's name: {text[:300]}"
        return type(error), text


def assert_alike(name: str, call: dict[str, Any], what: str) -> None:
    found = {}
    for backend in BACKENDS:
        with gfl_ops.set_backend(backend):
            try:
                found[backend] = outcome(name, call)
            except Exception as error:
                raise AssertionError(
                    f"{name}, {what}, {backend}: {type(error).__name__}: {str(error)[:400]}"
                ) from error
    want = found["reference"]
    # What temperature² makes of the last bits of a divergence that is nearly 0.
    blown_up = name == "distillation_loss" and isinstance(want, Tensor) and float(call["temperature"]) > 1e3
    for backend, got in found.items():
        where = f"{name}, {what}, {backend}: "
        if (isinstance(want, tuple) and isinstance(want[0], type)) or (
            isinstance(got, tuple) and isinstance(got[0], type)
        ):
            assert got == want, where + f"{str(got)[:200]}, the reference {str(want)[:200]}"
            continue
        for g, w in zip(tensors(got), tensors(want), strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype) or name in DECIDING, where + f"{g.shape} {w.shape}"
            if name not in DECIDING and not w.is_meta and not blown_up:
                assert_close(g.detach().double(), w.detach().double(), where)


def assert_close(got: Tensor, want: Tensor, where: str) -> None:
    # Numbers near the ends of the range may overflow in one order of operations and not in another.
    sure = want.isfinite() & (want.abs() < 1e30) & got.isfinite()
    scale = float(want[sure].abs().max()) if sure.any() else 0.0
    torch.testing.assert_close(got[sure], want[sure], rtol=1e-3, atol=1e-4 * (1 + scale), msg=lambda m: where + m)


def test_every_function_is_here() -> None:
    functions = {name for name in functional.__all__ if not isinstance(getattr(functional, name), type)}
    assert set(FUNCTIONS) == functions


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_argument(name: str, seed: int) -> None:
    fuzz(name, seed, 120)


def fuzz(name: str, seed: int, count: int) -> None:
    rnd = random.Random(seed)
    call = operator_calls.valid_calls(seed % 2**31)[name]
    assert_alike(name, call, "as it is")
    for _ in range(count):
        assert_alike(name, *operator_calls.mutated(call, rnd, rnd.choice((1, 1, 2))))


@pytest.mark.slow
def test_many_calls(seed: int) -> None:
    for i in range(100):
        for name in FUNCTIONS:
            fuzz(name, seed + i, 40)


@pytest.mark.slow
def test_memory_does_not_grow(seed: int) -> None:
    """Results, errors, gradients and transforms leave nothing behind."""
    calls = operator_calls.valid_calls(seed)

    def some() -> None:
        rnd = random.Random(seed)
        for name in FUNCTIONS:
            for _ in range(20):
                outcome(name, operator_calls.mutated(calls[name], rnd)[0])
            transformed(name, calls[name], seed)

    some()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        some()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 * 1024, f"{grown} KB more after 10^4 calls"


# --- Transforms of functions -------------------------------------------------------------------------------------


def floating(call: dict[str, Any]) -> list[str]:
    """The arguments that are floating tensors, or lists of them."""
    found = {k: tensors(v) for k, v in call.items() if isinstance(v, (Tensor, list))}
    return [k for k, ts in found.items() if ts and all(t.is_floating_point() for t in ts)]


def differentiable(
    name: str, call: dict[str, Any], argument: str
) -> tuple[Callable[..., list[Tensor]], list[Tensor]] | None:
    """The results with a gradient as a function of one floating argument, and that argument's tensors."""
    given = call[argument]
    leaves = [t.detach().clone() for t in tensors(given)]

    def function(*values: Tensor) -> list[Tensor]:
        value = values[0] if isinstance(given, Tensor) else list(values)
        results = tensors(getattr(gfl_ops, name)(**{**call, argument: value}))
        return results if chosen is None else [results[i] for i in chosen]

    chosen: list[int] | None = None
    with gfl_ops.set_backend("reference"):
        recorded = function(*(x.clone().requires_grad_() for x in leaves))
    chosen = [i for i, r in enumerate(recorded) if r.requires_grad]
    return (function, leaves) if chosen else None


def transformed(name: str, call: dict[str, Any], seed: int) -> list[tuple[str, Any]]:
    """(transform, what it gives) of a differentiable function, by an argument that is drawn."""
    found = differentiable(name, call, random.Random(seed).choice(floating(call)))
    if found is None:
        return []
    function, leaves = found
    draw = torch.Generator().manual_seed(seed)
    tangents = tuple(torch.randn(x.shape, generator=draw) for x in leaves)
    every = tuple(range(len(leaves)))

    def total(*values: Tensor) -> Tensor:
        return torch.stack([(r * r).sum() for r in function(*values)]).sum()

    def dual() -> list[Tensor]:
        with forward_ad.dual_level():
            results = function(*(forward_ad.make_dual(x, t) for x, t in zip(leaves, tangents)))
            return [forward_ad.unpack_dual(r).tangent for r in results]

    def batch() -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in leaves]
        results = function(*inputs)
        grads = [torch.stack([torch.ones_like(r), torch.full_like(r, 0.5)]) for r in results]
        return torch.autograd.grad(results, inputs, grads, is_grads_batched=True, materialize_grads=True)

    return [
        ("grad", torch.func.grad(total, every)(*leaves)),
        ("jvp", torch.func.jvp(lambda *x: tuple(function(*x)), tuple(leaves), tangents)[1]),
        ("forward_ad", dual()),
        ("is_grads_batched", batch()),
        ("vmap", torch.vmap(lambda *x: tuple(function(*x)))(*(torch.stack([x, 2 * x]) for x in leaves))),
        ("grad of vmap", torch.func.grad(lambda *x: torch.vmap(total)(*x).sum(), every)(*(x[None] for x in leaves))),
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(name: str, seed: int) -> None:
    """As of the reference, through the public function with its checks and reductions."""
    call = operator_calls.valid_calls(seed)[name]
    found = {}
    for backend in BACKENDS:
        with gfl_ops.set_backend(backend):
            found[backend] = transformed(name, call, seed)
    for backend, results in found.items():
        for (transform, got), (_, want) in zip(results, found["reference"], strict=True):
            for g, w in zip(tensors(got), tensors(want), strict=True):
                where = f"{name}, {transform}, {backend}: "
                torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4, msg=lambda m, where=where: where + m)


WITHOUT_GRADIENT = sorted(
    {name for spec in SPECS.values() for name in spec.public}
    - {name for spec in SPECS.values() if spec.differentiable for name in spec.public}
)


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_what_has_no_gradient_has_no_tangent(name: str, seed: int) -> None:
    """On no backend, whether the input requires a gradient or not."""
    call = operator_calls.valid_calls(seed)[name]
    for backend in BACKENDS:
        for argument in floating(call):
            for learned in (False, True):
                with gfl_ops.set_backend(backend), forward_ad.dual_level():
                    given = call[argument]
                    duals = [
                        forward_ad.make_dual(t.clone().requires_grad_(learned), torch.ones_like(t))
                        for t in tensors(given)
                    ]
                    value = duals[0] if isinstance(given, Tensor) else duals
                    results = tensors(getattr(gfl_ops, name)(**{**call, argument: value}))
                    left = [forward_ad.unpack_dual(r).tangent for r in results if r.is_floating_point()]
                    assert left == [None] * len(left), (argument, backend)
                    assert not any(r.requires_grad for r in results), (argument, backend)


@pytest.mark.parametrize("name", ["nms", "batched_nms", "soft_nms", "multiclass_nms"])
def test_vmap_over_results_of_unequal_size_is_refused(name: str) -> None:
    call = {k: v for k, v in operator_calls.valid_calls(1)[name].items() if k != "boxes"}
    apart, together = torch.arange(24.0).view(6, 4) * 100, torch.ones(6, 4) * torch.tensor([1.0, 1, 50, 50])
    with pytest.raises(NotImplementedError, match=r"torch\.vmap: the size of a result depends on the data"):
        torch.vmap(lambda boxes: getattr(gfl_ops, name)(boxes=boxes, **call))(torch.stack([apart, together]))
