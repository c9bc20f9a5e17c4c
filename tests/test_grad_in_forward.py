# SPDX-License-Identifier: Apache-2.0
"""Gradients computed in forward: right for whatever gradient arrives, however often, and never written over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from stored_gradients import FAMILIES, STEMS, Case, Family, Operators
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

import gfl_ops
from gfl_ops.core import backends

PLACES = [
    pytest.param((family, backend, device), id=f"{family.name}-{backend}-{device}")
    for family in FAMILIES
    for backend, device in family.backends
    if (device == "cpu" or torch.cuda.is_available())
    and backends.unavailable(backend, STEMS[family.name], device) is None
]
if not PLACES:
    pytest.skip("neither the compiled extension nor Triton can run here", allow_module_level=True)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Family, torch.device]]:
    family, backend, device = request.param
    with gfl_ops.set_backend(backend):
        yield family, torch.device(device)


@pytest.fixture
def family(place: tuple[Family, torch.device]) -> Family:
    return place[0]


@pytest.fixture
def case(place: tuple[Family, torch.device], generator: torch.Generator) -> Case:
    return place[0].draw(generator, place[1])


def steps(family: Family, *which: int) -> list[str]:
    return [name for i in which for name in family.steps[i].split()]


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Bit for bit, strides and all."""
    return all(
        g.dtype == w.dtype and g.stride() == w.stride() and torch.equal(g.nan_to_num(7e7), w.nan_to_num(7e7))
        for g, w in zip(got, want, strict=True)
    )


def test_every_gradient_that_arrives(case: Case, family: Family) -> None:
    """To the first backward pass, and each to a second one after each; the ordinary operators give the same."""
    fresh = case.call(case.leaves)
    case.gradient(fresh, case.factors[0])
    want = [case.gradient(fresh, factor) for factor in case.factors]
    for first, want_first in zip(case.factors, want):
        for second, want_second in zip(case.factors, want):
            with Operators() as seen:
                outputs = case.call(case.leaves)
                assert same(case.gradient(outputs, first), want_first)
                assert same(case.gradient(outputs, second), want_second)
            assert seen.names == steps(family, 0, 1, 2)
    ordinary = case.ordinary()
    torch.testing.assert_close(outputs, ordinary, rtol=2e-6, atol=0)
    for factor, got in zip(case.factors, want):
        for g, w in zip(got, case.gradient(ordinary, factor), strict=True):
            scale = float(w.nan_to_num(0).abs().max())
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6 * scale, equal_nan=True)


def test_outputs_that_are_not_used(case: Case) -> None:
    count = len(case.factors[0])
    for used in range(count):
        want = case.gradient(case.call(case.leaves), tuple(float(i == used) for i in range(count)))
        outputs = case.call(case.leaves)
        for _ in range(2):
            found = torch.autograd.grad(outputs[used].sum(), case.leaves, retain_graph=True)
            assert same(found, want)


def test_a_gradient_that_was_handed_out_belongs_to_its_owner(case: Case) -> None:
    """Written over, it does not show in a second backward pass, and no later pass writes over it."""
    outputs = case.call(case.leaves)
    first = case.gradient(outputs, case.factors[0])
    want = tuple(g.clone() for g in first)
    for g in first:
        g.fill_(7.0)
    second = case.gradient(outputs, case.factors[0])
    case.gradient(outputs, case.factors[1])
    assert same(second, want) and all((g == 7).all() for g in first)


def test_the_graph_lets_go_of_the_gradient(case: Case) -> None:
    outputs = case.call(case.leaves)
    found = [weakref.ref(g.untyped_storage()) for g in case.gradient(outputs, case.factors[0])]
    gc.collect()  # Triton's interpreter leaves cycles behind
    assert all(reference() is None for reference in found)


def test_a_leaf_takes_the_stored_gradient_without_a_copy(case: Case) -> None:
    with Operators() as seen:
        outputs = case.call(case.leaves)
    stored = {pointer for pointer, _ in seen.results[0]}
    sum(o.sum() for o in outputs if o.requires_grad).backward()  # type: ignore[union-attr]
    assert all(leaf.grad is not None and leaf.grad.data_ptr() in stored for leaf in case.leaves)


def test_accumulation_over_two_passes_adds_up(case: Case) -> None:
    total = sum(o.sum() for o in case.call(case.leaves) if o.requires_grad)
    total.backward(retain_graph=True)  # type: ignore[union-attr]
    first = [leaf.grad.clone() for leaf in case.leaves]  # type: ignore[union-attr]
    total.backward()  # type: ignore[union-attr]
    assert all(torch.equal(leaf.grad, g + g) for leaf, g in zip(case.leaves, first))  # type: ignore[arg-type]


def test_inputs_that_are_computed_and_inputs_that_change(case: Case) -> None:
    want = case.gradient(case.call(case.leaves), case.factors[0])
    computed = [leaf * 1.0 for leaf in case.leaves]
    assert same(case.gradient(case.call(computed), case.factors[0]), want)
    outputs = case.call(computed)
    with torch.no_grad():
        computed[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.gradient(outputs, case.factors[0])


def test_a_second_derivative_is_refused(case: Case) -> None:
    outputs = case.call(case.leaves)
    want = case.gradient(outputs, case.factors[0])
    found = case.gradient(outputs, case.factors[0], create_graph=True)
    for g, w in zip(found, want):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6 * float(w.abs().max()))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        found[0].sum().backward()


def test_hooks_on_saved_tensors_and_anomaly_mode(case: Case) -> None:
    want = case.gradient(case.call(case.leaves), case.factors[0])
    packed: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t)
    with hooks, torch.autograd.set_detect_anomaly(True, check_nan=False):
        outputs = case.call(case.leaves)
        for _ in range(2):
            assert same(case.gradient(outputs, case.factors[0]), want)
    # The hooks see the inputs; the stored gradient is not theirs to keep.
    assert {t.data_ptr() for t in case.leaves} <= {t.data_ptr() for t in packed}


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "function mode": Functions,
    "profiler": torch.profiler.profile,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_nothing(mode: str, case: Case) -> None:
    want = case.gradient(case.call(case.leaves), case.factors[0])
    with MODES[mode]() as entered:
        got = case.gradient(case.call(case.leaves), case.factors[0])
    assert same(got, want)
    if mode == "profiler":
        assert any(event.key.startswith("gfl") for event in entered.key_averages())


def test_where_no_gradient_is_stored(case: Case, family: Family) -> None:
    """Nothing to record, a backend without such kernels, fp16, subclasses, transforms of functions, fake tensors."""

    def scalar(leaf: Tensor) -> Tensor:
        return case.call([leaf, *(other.detach() for other in case.leaves[1:])])[0].sum()

    with Operators() as seen:
        case.call([leaf.detach() for leaf in case.leaves])
        with torch.no_grad():
            case.call(case.leaves)
        half = [leaf.detach().half().requires_grad_() for leaf in case.leaves]
        torch.autograd.grad(case.call(half)[0].sum(), half)
        case.gradient(case.ordinary(), case.factors[0])
        with gfl_ops.set_backend("reference"):
            case.gradient(case.call(case.leaves), case.factors[0])
            got = torch.func.grad(scalar)(case.leaves[0].detach())
        torch.func.functionalize(scalar)(case.leaves[0].detach())
    for name, results in zip(seen.names, seen.results):
        assert not name.endswith(("finish", "keep", "fwd_and_grad")), name
        assert name != "score_loss_fwd" or results[1][1] == (0,), "a gradient was stored"
    want = torch.autograd.grad(scalar(case.leaves[0]), case.leaves[0])[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        leaves = [fake.from_tensor(leaf) for leaf in case.leaves]
        found = case.call(leaves)
    assert [o.shape for o in found] == [o.shape for o in case.call(case.leaves)]


def test_a_compiled_graph_stores_nothing(case: Case, family: Family) -> None:
    want = case.gradient(case.call(case.leaves), tuple(1.0 for _ in case.factors[0]))
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend=backend)
    got = case.gradient(compiled(case.leaves), tuple(1.0 for _ in case.factors[0]))
    assert any("gfl" in name for name in seen)
    assert not any(word in name for name in seen for word in ("finish", "keep", "fwd_and_grad", "score_loss"))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6 * float(w.abs().max()))
