# SPDX-License-Identifier: Apache-2.0
"""The head's losses and their gradients in one walk: the same bits as in two, whatever is done with them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gfl_ops import Assignment, HeadLoss, gfl_loss, set_backend
from gfl_ops.core.random_inputs import boxes as draw_boxes
from gfl_ops.ops.head import one_pass

DEVICES = [d for d in ("cpu", "cuda") if d in one_pass._DEVICES and (d == "cpu" or torch.cuda.is_available())]
if not DEVICES:
    pytest.skip("the compiled extension is not there", allow_module_level=True)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that are called, in turn."""
    names: list[str] = []

    class Operators:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                names.append(name.removeprefix("gfl_loss_"))
                return getattr(torch.ops.gfl, name)(*arguments)

            return call

    class Torch:
        ops = type("Ops", (), {"gfl": Operators()})

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(one_pass, "torch", Torch())
    return names


def in_two_passes(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "_DEVICES", ())
        return call()


STRIDES, SIZES, CLASSES, REG_MAX = [8.0, 16.0, 32.0], [(19, 23), (5, 7), (1, 1)], 37, 7


class Head:
    """Maps of two images and what is asked of them: a tenth of the locations positive, a tenth left out."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        cells = sum(h * w for h, w in SIZES)

        def maps(channels: int) -> list[Tensor]:
            return [(torch.randn((2, channels, h, w), generator=generator) * 2).to(device) for h, w in SIZES]

        self.cls_scores, self.reg_preds = maps(CLASSES), maps(4 * (REG_MAX + 1))
        kind = torch.rand((2, cells), generator=generator)
        drawn = torch.randint(0, CLASSES, (2, cells), generator=generator)
        labels = torch.where(kind < 0.1, drawn, torch.where(kind > 0.9, -2, -1))
        matched = torch.randint(0, 3, (2, cells), generator=generator)
        self.assignment = Assignment(labels.to(device), matched.to(device), torch.zeros(2, cells, device=device))
        self.gt_boxes = draw_boxes(6, device, torch.float32, generator, extent=180.0).view(2, 3, 4)

    def leaves(self, change: Callable[[Tensor], Tensor] = lambda m: m) -> list[Tensor]:
        return [change(m).detach().requires_grad_() for m in (*self.cls_scores, *self.reg_preds)]

    def loss(self, maps: list[Tensor], **options: Any) -> HeadLoss:
        half = len(maps) // 2
        return gfl_loss(maps[:half], maps[half:], STRIDES, self.assignment, self.gt_boxes, reg_max=REG_MAX, **options)


@pytest.fixture
def head(generator: torch.Generator, device: torch.device) -> Head:
    return Head(generator, device)


@pytest.mark.parametrize("options", [{}, {"cls_norm": 3.5, "box_norm": 0.7}], ids=["norms", "given"])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_the_head_has_the_bits_of_two_passes(
    head: Head,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    layout: str,
    options: dict[str, Any],
) -> None:
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    leaves = head.leaves(lambda m: m.to(dtype).contiguous(memory_format=memory_format))

    def call() -> list[Tensor]:
        losses = head.loss(leaves, **options)
        gradients = torch.autograd.grad(losses.cls + losses.box + losses.dfl, leaves)
        return [*(v.detach() for v in losses), *gradients]

    got = call()
    assert told == ["fwd_and_grad", "finish"]
    for g, w in zip(got, in_two_passes(monkeypatch, call)):
        assert torch.equal(g, w) and g.stride() == w.stride() and g.dtype == w.dtype


def test_the_head_serves_every_gradient_that_arrives(
    head: Head, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors, one of 0, a NaN, losses of which some are not used: to the first pass, and to a second one after it."""
    leaves = head.leaves()
    factors = [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.5, -3.0), (1.0, 1.0, float("nan"))]

    def call() -> list[Tensor]:
        found: list[Tensor] = []
        for first, second in zip(factors, [*factors[1:], factors[0]]):
            losses = head.loss(leaves)
            for each in (first, second):
                total = sum(f * v for f, v in zip(each, losses))
                found += [g.clone() for g in torch.autograd.grad(total, leaves, retain_graph=True)]
        for which in range(3):
            alone = head.loss(leaves)[which]
            gradients = torch.autograd.grad(alone, leaves, allow_unused=True)
            found += [torch.zeros_like(m) if g is None else g for g, m in zip(gradients, leaves)]
        return found

    found = call()
    assert told == ["fwd_and_grad", "finish", "bwd"] * len(factors) + ["fwd_and_grad", "finish"] * 3
    for got, want in zip(found, in_two_passes(monkeypatch, call), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_of_the_head_that_was_handed_out_is_its_owners(head: Head) -> None:
    """Written over, it does not show in a second backward pass, and that pass does not write over it."""
    leaves = head.leaves()
    losses = head.loss(leaves)
    total = losses.cls + losses.box + losses.dfl
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7.0)
    second = torch.autograd.grad(total, leaves, torch.tensor(1.0, device=total.device), retain_graph=True)
    third = torch.autograd.grad(2 * total, leaves)
    for a, b, c, k in zip(first, second, third, kept):
        assert torch.equal(a, torch.full_like(a, 7.0)) and torch.equal(b, k)
        torch.testing.assert_close(c, 2 * k, rtol=1e-6, atol=0)


def test_the_heads_gradients_accumulate(head: Head) -> None:
    leaves = head.leaves()
    losses = head.loss(leaves)
    total = losses.cls + losses.box + losses.dfl
    total.backward(retain_graph=True)
    first = [m.grad.clone() for m in leaves]
    total.backward()
    for m, g in zip(leaves, first):
        assert torch.equal(m.grad, g + g)


def test_the_head_with_maps_that_need_no_gradient(head: Head, told: list[str]) -> None:
    leaves = head.leaves()
    losses = head.loss(leaves)
    want = torch.autograd.grad(losses.cls + losses.box + losses.dfl, leaves)
    half = len(leaves) // 2
    for frozen in (range(half), range(half, 2 * half), range(0, 2 * half, 2)):
        maps = [m.detach() if i in frozen else m for i, m in enumerate(leaves)]
        losses = head.loss(maps)
        wanted = [m for m in maps if m.requires_grad]
        got = iter(torch.autograd.grad(losses.cls + losses.box + losses.dfl, wanted))
        for i, g in enumerate(want):
            assert i in frozen or torch.equal(next(got), g)
    assert told == ["fwd_and_grad", "finish"] * 4


def test_where_the_head_does_not_use_it(head: Head, told: list[str]) -> None:
    leaves = head.leaves()
    head.loss([m.detach() for m in leaves])
    head.loss([m.half() for m in leaves])
    with set_backend("reference"):
        head.loss(leaves)
    with torch.no_grad():
        head.loss(leaves)
    assert told == []


def test_a_compiled_graph_does_not_use_it(head: Head) -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def total(maps: list[Tensor]) -> Tensor:
        losses = head.loss(maps)
        return losses.cls + losses.box + losses.dfl

    leaves = head.leaves()
    torch._dynamo.reset()
    torch.compile(total, fullgraph=True, backend=backend)(leaves).backward()
    assert any("gfl_loss" in name for name in seen) and not any("fwd_and_grad" in name for name in seen)
    assert leaves[0].grad is not None


def test_a_second_derivative_of_the_head_is_refused(head: Head) -> None:
    leaves = head.leaves()
    losses = head.loss(leaves)
    gradient = torch.autograd.grad(losses.cls + losses.box + losses.dfl, leaves, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_the_heads_operators_keep_torchs_rules(head: Head) -> None:
    labels, matched, _ = head.assignment
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        maps = [[m.to(dtype) for m in part] for part in (head.cls_scores, head.reg_preds)]
        constants = (None, None, REG_MAX, [1.0, 2.0, 0.25], 2.0, [0.0] * 3, False)
        arguments = (*maps, STRIDES, labels, matched, head.gt_boxes.to(acc), *constants)
        torch.library.opcheck(torch.ops.gfl.gfl_loss_fwd_and_grad, (*arguments, (True, True)))
        *losses, scales, of_scores, of_preds = torch.ops.gfl.gfl_loss_fwd_and_grad(*arguments, (True, True))
        for got, want in zip(losses, torch.ops.gfl.gfl_loss_fwd(*arguments), strict=True):
            assert torch.equal(got, want)
        one = torch.ones((), dtype=acc, device=labels.device)
        settled = ([m.clone() for m in of_scores], [m.clone() for m in of_preds], one, 2 * one, one, scales, *arguments)
        torch.library.opcheck(torch.ops.gfl.gfl_loss_finish, (*settled, (True, True)))
        wanted = torch.ops.gfl.gfl_loss_bwd(one, one, one, *arguments, (True, True))
        for got, want in zip(of_scores + of_preds, wanted[0] + wanted[1], strict=True):
            assert torch.equal(got, want)
