# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient in one walk on the CPU: the same bits as in two, whatever is done with them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gfl_ops import Assignment, HeadLoss, _extension, _one_pass, gfl_loss, quality_focal_loss, set_backend
from gfl_ops._samples import boxes as draw_boxes

pytestmark = pytest.mark.skipif(
    not _extension.serves("qfl_fwd_and_grad", "cpu"), reason="the compiled extension is not there"
)
Inputs = tuple[Tensor, tuple[Tensor, Tensor], Tensor]


@pytest.fixture
def inputs(generator: torch.Generator) -> Inputs:
    """More rows than the least number, of 37 classes: registers are filled in part."""
    n = _one_pass.LEAST_ELEMENTS // 37 + 5
    pred = torch.randn(n, 37, generator=generator) * 3
    label = torch.randint(-2, 41, (n,), generator=generator)
    return pred, (label, torch.rand(n, generator=generator)), torch.rand(n, generator=generator)


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each gradient that was stored, and for each that was computed from the logits."""
    told: list[str] = []

    def watch(name: str, operator: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            told.append(name)
            return operator(*arguments)

        return call

    class Operators:
        qfl_fwd_and_grad = staticmethod(watch("stored", torch.ops.gfl.qfl_fwd_and_grad))
        qfl_bwd = staticmethod(watch("computed", torch.ops.gfl.qfl_bwd))
        gfl_loss_fwd_and_grad = staticmethod(watch("stored", torch.ops.gfl.gfl_loss_fwd_and_grad))
        gfl_loss_bwd = staticmethod(watch("computed", torch.ops.gfl.gfl_loss_bwd))

    class Torch:
        ops = type("Ops", (), {"gfl": Operators})

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(_one_pass, "torch", Torch())
    return told


def in_two_passes(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(_one_pass, "LEAST_ELEMENTS", 1 << 62)
        return call()


REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "mean-factor": {"avg_factor": 3.3},
    "mean-tensor": {"avg_factor": torch.tensor([7.7])},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("dtype", _one_pass.DTYPES, ids=["fp32", "bf16"])
def test_it_has_the_bits_of_two_passes(
    inputs: Inputs,
    recomputed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    how: str,
    weighted: bool,
) -> None:
    pred, target, weight = inputs
    pred = pred.to(dtype).requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        loss = quality_focal_loss(pred, target, weight if weighted else None, **REDUCTIONS[how])
        return loss.detach(), torch.autograd.grad(loss, pred)[0]

    loss, gradient = call()
    assert recomputed == ["stored"]
    want_loss, want_gradient = in_two_passes(monkeypatch, call)
    assert torch.equal(loss, want_loss)
    assert torch.equal(gradient, want_gradient)


def test_every_gradient_that_arrives_is_served(
    inputs: Inputs, recomputed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass, another factor, 0 after it, and a gradient that was overwritten in between."""
    pred, target, weight = inputs
    pred.requires_grad_()

    def call() -> list[Tensor]:
        loss = quality_focal_loss(pred, target, weight, avg_factor=2.0)
        found = []
        for factor in (1.0, 1.0, -3.5, 0.0, 1.0):
            gradient = torch.autograd.grad(loss, pred, torch.tensor(factor), retain_graph=True)[0]
            found.append(gradient.clone())
        return found

    found = call()
    assert recomputed == ["stored", "computed", "computed"]
    for got, want in zip(found, in_two_passes(monkeypatch, call)):
        assert torch.equal(got, want)


def test_a_gradient_that_was_overwritten_is_not_handed_out_again(inputs: Inputs) -> None:
    pred, target, _ = inputs
    pred.requires_grad_()
    loss = quality_focal_loss(pred, target)
    torch.autograd.grad(loss, pred, retain_graph=True)[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_accumulation_over_two_passes_adds_up(inputs: Inputs) -> None:
    pred, target, _ = inputs
    pred.requires_grad_()
    loss = quality_focal_loss(pred, target)
    loss.backward(retain_graph=True)
    first = pred.grad.clone()
    loss.backward()
    assert torch.equal(pred.grad, first + first)


def test_what_the_gradient_reaches_besides(inputs: Inputs, recomputed: list[str]) -> None:
    """The weight's gradient needs nothing; the score's goes the long way."""
    pred, (label, score), weight = inputs
    pred.requires_grad_()
    weight.requires_grad_()
    quality_focal_loss(pred, (label, score), weight).backward()
    assert weight.grad is not None and recomputed == ["stored"]
    score.requires_grad_()
    quality_focal_loss(pred, (label, score), weight).backward()
    assert score.grad is not None and recomputed == ["stored"]


def test_where_it_is_not_used(inputs: Inputs, recomputed: list[str]) -> None:
    pred, target, _ = inputs
    quality_focal_loss(pred, target)
    wanted = pred.clone().requires_grad_()
    quality_focal_loss(wanted, target, reduction="none")
    quality_focal_loss(wanted.half(), target)
    quality_focal_loss(wanted.double(), target)
    quality_focal_loss(wanted[:3], (target[0][:3], target[1][:3]))
    with set_backend("reference"):
        quality_focal_loss(wanted, target)
    with torch.no_grad():
        quality_focal_loss(wanted, target)
    torch.compile(quality_focal_loss, fullgraph=True, backend="aot_eager")(wanted, target).backward()
    assert recomputed == []


def test_a_second_derivative_is_refused(inputs: Inputs) -> None:
    pred, target, _ = inputs
    pred.requires_grad_()
    gradient = torch.autograd.grad(quality_focal_loss(pred, target), pred, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_the_operator_keeps_torchs_rules(generator: torch.Generator) -> None:
    pred = torch.randn(33, 20, generator=generator)
    label, score = torch.randint(0, 21, (33,), generator=generator), torch.rand(33, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        for beta, activated in ((2.0, False), (1.5, False), (2.0, True)):
            x = (pred.sigmoid() if activated else pred).to(dtype)
            arguments = (x, label, score.to(acc), beta, activated, torch.ones(33, dtype=acc))
            torch.library.opcheck(torch.ops.gfl.qfl_fwd_and_grad, arguments)
            loss, gradient = torch.ops.gfl.qfl_fwd_and_grad(*arguments)
            assert torch.equal(loss, torch.ops.gfl.qfl_fwd(*arguments[:-1]))
            assert torch.equal(gradient, torch.ops.gfl.qfl_bwd(arguments[-1], *arguments[:-1], (True, False))[0])


# ---- the head's loss ----

HEAD_STRIDES, HEAD_SIZES, HEAD_CLASSES, HEAD_REG_MAX = [8.0, 16.0, 32.0], [(19, 23), (5, 7), (1, 1)], 37, 7


class Head:
    """Maps of two images and what is asked of them: a tenth of the locations positive, a tenth left out."""

    def __init__(self, generator: torch.Generator) -> None:
        cells = sum(h * w for h, w in HEAD_SIZES)

        def maps(channels: int) -> list[Tensor]:
            return [torch.randn((2, channels, h, w), generator=generator) * 2 for h, w in HEAD_SIZES]

        self.cls_scores, self.reg_preds = maps(HEAD_CLASSES), maps(4 * (HEAD_REG_MAX + 1))
        kind = torch.rand((2, cells), generator=generator)
        drawn = torch.randint(0, HEAD_CLASSES, (2, cells), generator=generator)
        labels = torch.where(kind < 0.1, drawn, torch.where(kind > 0.9, -2, -1))
        matched = torch.randint(0, 3, (2, cells), generator=generator)
        self.assignment = Assignment(labels, matched, torch.zeros(2, cells))
        self.gt_boxes = draw_boxes(6, torch.device("cpu"), torch.float32, generator, extent=180.0).view(2, 3, 4)

    def leaves(self, change: Callable[[Tensor], Tensor] = lambda m: m) -> list[Tensor]:
        return [change(m).detach().requires_grad_() for m in (*self.cls_scores, *self.reg_preds)]

    def loss(self, maps: list[Tensor], **options: Any) -> HeadLoss:
        half = len(maps) // 2
        return gfl_loss(
            maps[:half], maps[half:], HEAD_STRIDES, self.assignment, self.gt_boxes, reg_max=HEAD_REG_MAX, **options
        )


@pytest.fixture
def head(generator: torch.Generator) -> Head:
    return Head(generator)


@pytest.mark.parametrize("options", [{}, {"cls_norm": 3.5, "box_norm": torch.tensor([0.7])}], ids=["norms", "given"])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", _one_pass.DTYPES, ids=["fp32", "bf16"])
def test_the_head_has_the_bits_of_two_passes(
    head: Head,
    recomputed: list[str],
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
    assert recomputed == ["stored"]
    for g, w in zip(got, in_two_passes(monkeypatch, call)):
        assert torch.equal(g, w) and g.stride() == w.stride() and g.dtype == w.dtype


def test_the_head_serves_every_gradient_that_arrives(
    head: Head, recomputed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass, factors, one of 0, losses of which some are not used, and a stored gradient after all that."""
    leaves = head.leaves()
    factors = [(1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.5, -3.0), (1.0, 1.0, 1.0)]

    def call() -> list[Tensor]:
        losses = head.loss(leaves)
        found: list[Tensor] = []
        for each in factors:
            total = sum(f * v for f, v in zip(each, losses))
            found += [g.clone() for g in torch.autograd.grad(total, leaves, retain_graph=True)]
        for alone in losses[:3]:
            gradients = torch.autograd.grad(alone, leaves, retain_graph=True, allow_unused=True)
            found += [torch.zeros_like(m) if g is None else g for g, m in zip(gradients, leaves)]
        return found

    found = call()
    assert recomputed == ["stored"] + ["computed"] * 6
    for got, want in zip(found, in_two_passes(monkeypatch, call), strict=True):
        assert torch.equal(got, want)


def test_the_head_does_not_hand_out_what_was_overwritten(head: Head) -> None:
    leaves = head.leaves()
    losses = head.loss(leaves)
    total = losses.cls + losses.box + losses.dfl
    torch.autograd.grad(total, leaves, retain_graph=True)[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_heads_gradients_accumulate(head: Head) -> None:
    leaves = head.leaves()
    losses = head.loss(leaves)
    total = losses.cls + losses.box + losses.dfl
    total.backward(retain_graph=True)
    first = [m.grad.clone() for m in leaves]
    total.backward()
    for m, g in zip(leaves, first):
        assert torch.equal(m.grad, g + g)


def test_the_head_with_maps_that_need_no_gradient(head: Head, recomputed: list[str]) -> None:
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
    assert recomputed == ["stored"] * 4


def test_where_the_head_does_not_use_it(head: Head, recomputed: list[str]) -> None:
    leaves = head.leaves()
    head.loss([m.detach() for m in leaves])
    head.loss([m.half() for m in leaves])
    head.loss([m.double() for m in leaves])
    with set_backend("reference"):
        head.loss(leaves)
    with torch.no_grad():
        head.loss(leaves)
    compiled = torch.compile(lambda maps: sum(head.loss(maps)[:3]), fullgraph=True, backend="aot_eager")
    compiled(leaves).backward()
    assert recomputed == [] and leaves[0].grad is not None


def test_a_second_derivative_of_the_head_is_refused(head: Head) -> None:
    leaves = head.leaves()
    losses = head.loss(leaves)
    gradient = torch.autograd.grad(losses.cls + losses.box + losses.dfl, leaves, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_the_heads_operator_keeps_torchs_rules(head: Head) -> None:
    labels, matched, _ = head.assignment
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        maps = [[m.to(dtype) for m in part] for part in (head.cls_scores, head.reg_preds)]
        constants = (None, None, HEAD_REG_MAX, [1.0, 2.0, 0.25], 2.0, [0.0] * 3, False)
        arguments = (*maps, HEAD_STRIDES, labels, matched, head.gt_boxes.to(acc), *constants)
        torch.library.opcheck(torch.ops.gfl.gfl_loss_fwd_and_grad, (*arguments, (True, True)))
        *losses, of_scores, of_preds = torch.ops.gfl.gfl_loss_fwd_and_grad(*arguments, (True, True))
        for got, want in zip(losses, torch.ops.gfl.gfl_loss_fwd(*arguments), strict=True):
            assert torch.equal(got, want)
        one = torch.ones((), dtype=acc)
        wanted = torch.ops.gfl.gfl_loss_bwd(one, one, one, *arguments, (True, True))
        for got, want in zip(of_scores + of_preds, wanted[0] + wanted[1], strict=True):
            assert torch.equal(got, want)
