# SPDX-License-Identifier: Apache-2.0
"""Calls that go past the dispatcher: the same result, and only where nothing else wants to see the call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gfl_ops
from gfl_ops.core import extension
from gfl_ops.core.registry import SPECS, OpSpec

STEM = "qfl"

direct = extension.direct
pytestmark = pytest.mark.skipif(direct("qfl_forward") is None, reason="the compiled extension is not there")


class Plain(Tensor):
    """A subclass that changes nothing."""


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def call(generator: torch.Generator) -> tuple[Any, ...]:
    """Arguments of quality focal loss."""
    rows, classes = int(torch.randint(1, 40, (), generator=generator)), 5
    label = torch.randint(0, classes + 1, (rows,), generator=generator)
    return (
        torch.randn((rows, classes), generator=generator), label, torch.rand(rows, generator=generator), [2.0], False,
    )  # fmt: skip


def qfl(*arguments: Any) -> Tensor | None:
    function = direct("qfl_forward")
    assert function is not None
    return function(*arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda s: s.stem)
def test_it_is_the_operator(spec: OpSpec, generator: torch.Generator) -> None:
    function = direct(f"{spec.stem}_forward")
    assert function is not None
    for sample in spec.samples(torch.device("cpu"), torch.float32, generator):
        got = function(*sample.args)
        want = getattr(torch.ops.gfl, spec.forward_name)(*sample.args)
        assert type(got) is type(want), sample.id
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_plain_calls_take_it(call: tuple[Any, ...]) -> None:
    pred, *others = call
    leaf = pred.clone().requires_grad_()
    assert qfl(*call) is not None
    assert qfl(torch.nn.Parameter(pred, requires_grad=False), *others) is not None
    with torch.no_grad():
        assert qfl(leaf, *others) is not None
    with torch.inference_mode():
        assert qfl(leaf, *others) is not None and qfl(pred.clone(), *others) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert qfl(*call) is not None


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": Watch,
    "function mode": WatchFunctions,
    "fake tensors": torch._subclasses.FakeTensorMode,
    "profiler": torch.profiler.profile,
}


@pytest.mark.parametrize("mode", MODES)
def test_whoever_watches_sees_the_operator(mode: str, call: tuple[Any, ...]) -> None:
    with MODES[mode]():
        assert qfl(*call) is None
    assert qfl(*call) is not None


def test_the_public_function_is_seen(call: tuple[Any, ...]) -> None:
    pred, label, score, *_ = call
    want = gfl_ops.quality_focal_loss(pred, (label, score), reduction="none")
    for watch in (Watch(), WatchFunctions()):
        with watch:
            got = gfl_ops.quality_focal_loss(pred, (label, score), reduction="none")
            gfl_ops.quality_focal_loss(pred, (label, score))
        assert torch.equal(got, want)
        assert any("qfl_fwd" in name for name in watch.seen) and any("score_loss_fwd" in name for name in watch.seen)
    with torch.profiler.profile() as profile:
        gfl_ops.quality_focal_loss(pred, (label, score), reduction="none")
    assert "gfl::qfl_fwd" in {event.key for event in profile.key_averages()}


def test_other_tensors_go_through_the_dispatcher(call: tuple[Any, ...]) -> None:
    pred, label, score, *constants = call
    others = (label, score, *constants)
    assert qfl(pred.clone().requires_grad_(), *others) is None
    assert qfl(pred, label, score.clone().requires_grad_(), *constants) is None
    assert qfl(pred.as_subclass(Plain), *others) is None  # type: ignore[arg-type]
    assert qfl(pred.to("meta"), *others) is None
    assert qfl(pred.to_sparse(), *others) is None
    negative = torch._neg_view(pred)
    assert qfl(negative, *others) is None
    torch.testing.assert_close(SPECS["qfl"]("cpu", negative, *others), SPECS["qfl"]("cpu", -pred, *others))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pred, torch.ones_like(pred))
        assert qfl(dual, *others) is None
    assert qfl(*call[:-1]) is None


def test_transforms_see_the_operator(call: tuple[Any, ...]) -> None:
    met = []

    def inner(pred: Tensor) -> Tensor:
        met.append(qfl(pred, *call[1:]))
        return pred.sum()

    torch.vmap(inner)(torch.stack([call[0], call[0]]))
    torch.func.grad(inner)(call[0])
    torch.func.functionalize(inner)(call[0])
    torch.jit.trace(inner, (call[0],), check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(inner)(call[0])
    assert met == [None] * 5


def test_lists_are_looked_into(generator: torch.Generator) -> None:
    function = direct("group_norm_relu_forward")
    assert function is not None
    maps = [torch.randn((1, 4, 3, 3), generator=generator) for _ in range(2)]
    rest = torch.ones(4), torch.zeros(4), 2, 1e-5, True
    assert function(maps, *rest) is not None
    assert function([maps[0], maps[1].requires_grad_()], *rest) is None


def test_errors_keep_their_types(call: tuple[Any, ...]) -> None:
    pred, label, score, *constants = call
    with pytest.raises(ValueError, match="`label` must have shape"):
        qfl(pred, label[:0], score, *constants)
    with pytest.raises(TypeError, match="`target` must be Float"):
        qfl(pred, label, score.double(), *constants)
