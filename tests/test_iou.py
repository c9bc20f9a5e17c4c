# SPDX-License-Identifier: Apache-2.0
"""IoU losses: what is special to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gfl_ops import box_iou_loss, giou_loss
from gfl_ops.core.random_inputs import boxes
from gfl_ops.ops.boxes.iou import KINDS

STEM = "iou"
NAN = float("nan")


SIZE = (480.0, 640.0)


def loss_of(pred: Tensor, target: Tensor, kind: str, **options: Any) -> Tensor:
    """`box_iou_loss` with an image's size for the kind that needs it."""
    return box_iou_loss(pred, target, kind=kind, **options, **({"image_size": SIZE} if kind == "mpdiou" else {}))


def signed_overlap(p: list[float], t: list[float]) -> float:
    """EIoU's intersection, from the enclosing box's corner."""
    first = [max(p[i], t[i]) - min(p[i], t[i]) for i in (0, 1)]
    second = [min(p[i + 2], t[i + 2]) - min(p[i], t[i]) for i in (0, 1)]
    low, high = ([f(a, b) for a, b in zip(first, second)] for f in (min, max))
    return second[0] * second[1] + low[0] * low[1] - first[0] * high[1] - high[0] * first[1]


def siou_costs(p: list[float], t: list[float], eps: float) -> float:
    """Distance and shape, the angle taken as an angle."""
    way = [(t[i] + t[i + 2] - p[i] - p[i + 2]) / 2 + eps for i in (0, 1)]
    gamma = 2 - math.sin(2 * math.asin(abs(way[1]) / math.hypot(*way)))
    cost = 0.0
    for i in (0, 1):
        outer = max(p[i + 2], t[i + 2]) - min(p[i], t[i])
        sizes = p[i + 2] - p[i] + eps, t[i + 2] - t[i] + eps
        cost += 1 - math.exp(gamma * (way[i] / outer) ** 2)
        cost += (1 - math.exp(-abs(sizes[0] - sizes[1]) / max(sizes))) ** 4
    return cost


def by_hand(p: list[float], t: list[float], kind: str, eps: float) -> float:
    """The formulas for one pair, in Python's own floats."""
    overlap = max(0.0, min(p[2], t[2]) - max(p[0], t[0])) * max(0.0, min(p[3], t[3]) - max(p[1], t[1]))
    pw, ph, tw, th = p[2] - p[0], p[3] - p[1], t[2] - t[0], t[3] - t[1]
    union = pw * ph + tw * th - overlap
    cw, ch = max(p[2], t[2]) - min(p[0], t[0]), max(p[3], t[3]) - min(p[1], t[1])
    if kind in ("iou", "giou"):
        iou = overlap / max(union, eps)
        return 1 - iou if kind == "iou" else 1 - iou + (cw * ch - union) / (cw * ch)
    if kind == "eiou":
        overlap = signed_overlap(p, t)
        cost = 1 - overlap / (pw * ph + tw * th - overlap + eps)
        return cost**2 / 0.2 if cost < 0.1 else cost - 0.05
    iou = overlap / (union + eps)
    if kind == "siou":
        return 1 - min(1.0, max(-1.0, iou - siou_costs(p, t, eps) / 2))
    if kind == "mpdiou":
        return 1 - iou + sum((a - b) ** 2 for a, b in zip(p, t)) / (SIZE[0] ** 2 + SIZE[1] ** 2)
    distance = ((p[0] + p[2] - t[0] - t[2]) / 2) ** 2 + ((p[1] + p[3] - t[1] - t[3]) / 2) ** 2
    loss = 1 - iou + distance / (cw**2 + ch**2 + eps)
    if kind == "diou":
        return loss
    v = 4 / math.pi**2 * (math.atan(tw / (th + eps)) - math.atan(pw / (ph + eps))) ** 2
    return loss + (v / (1 - iou + v) * v if iou > 0.5 else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_formula(kind: str, backend: str, device: torch.device, generator: torch.Generator) -> None:
    target = boxes(33, device, torch.float64, generator)
    pred = target + torch.randn(33, 4, generator=generator, dtype=torch.float64).to(device)
    got = loss_of(pred, target, kind, eps=1e-3, reduction="none")
    want = [by_hand(p, t, kind, 1e-3) for p, t in zip(pred.tolist(), target.tolist())]
    torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(giou_loss(pred, target), box_iou_loss(pred, target))


def test_a_tie_halves_the_gradient(backend: str, device: torch.device) -> None:
    """Equal boxes of side 4: each side of one moves the overlap by half of the 4 that it would alone."""
    box = torch.tensor([[0.0, 0, 4, 4]], dtype=torch.float64, device=device)
    pred, target = box.clone().requires_grad_(), box.clone().requires_grad_()
    box_iou_loss(pred, target, kind="iou").backward()
    # Moved outwards by d: overlap 16 + 2d, union 32 + 4d − overlap, so IoU gains 2/16 − 2/16 = 0.
    assert pred.grad is not None and target.grad is not None
    torch.testing.assert_close(pred.grad, torch.zeros_like(box), rtol=0, atol=1e-15)

    # One shared side, x1 = 0; pred reaches to 2: overlap 8, union 16. Moved left by d: 8 + 2d over 16 + 4d − 2d.
    pred = torch.tensor([[0.0, 0, 2, 4]], dtype=torch.float64, device=device, requires_grad=True)
    box_iou_loss(pred, target, kind="iou").backward()
    assert pred.grad is not None
    assert pred.grad[0, 0].item() == pytest.approx(2 / 16 - 8 * 2 / 16**2, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_boxes_are_finite(kind: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    pairs: list[list[list[float]]] = [
        [[5, 5, 5, 5], [5, 5, 5, 5]], [[5, 5, 5, 5], [7, 7, 7, 7]], [[5, 5, 5, 9], [0, 0, 9, 9]],
        [[5, 5, 9, 5], [5, 5, 9, 5]], [[9, 9, 5, 5], [0, 0, 20, 20]], [[0, 0, 1e4, 1e4], [0, 0, 1e4, 1e4]],
        [[0, 0, 0, 0], [0, 0, 1333, 800]], [[1e-4, 0, 2e-4, 1e-4], [0, 0, 1e-4, 1e-4]],
    ]  # fmt: skip
    values = torch.tensor(pairs, dtype=dtype, device=device)
    pred, target = values[:, 0].clone().requires_grad_(), values[:, 1].clone().requires_grad_()
    loss = loss_of(pred, target, kind, reduction="none")
    loss.sum().backward()
    assert pred.grad is not None and target.grad is not None
    for value in (loss, pred.grad, target.grad):
        assert torch.isfinite(value).all()


def test_equal_boxes_cost_nothing(backend: str, device: torch.device) -> None:
    """For CIoU the factor of the aspect term is 0/0 once eps is lost in rounding: mmdet gives NaN."""
    box = torch.tensor([[10.0, 10, 110, 110]], device=device)
    for kind in KINDS:
        pred = box.clone().requires_grad_()
        loss = loss_of(pred, box, kind)
        loss.backward()
        assert loss == 0
        assert pred.grad is not None and torch.isfinite(pred.grad).all()


def test_the_aspect_factor_has_no_gradient(backend: str, device: torch.device) -> None:
    target = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64, device=device)
    pred = torch.tensor([[0.5, 0.25, 11, 9]], dtype=torch.float64, device=device, requires_grad=True)
    (got,) = torch.autograd.grad(box_iou_loss(pred, target, kind="ciou"), pred)
    diou = box_iou_loss(pred, target, kind="diou")
    size = pred[0, 2:] - pred[0, :2]
    v = 4 / math.pi**2 * (math.pi / 4 - torch.atan(size[0] / size[1])) ** 2
    iou = 1 - box_iou_loss(pred, target, kind="iou")
    alpha = (v / (1 - iou + v)).detach()
    (want,) = torch.autograd.grad(diou + alpha * v, pred)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_nan_stays_in_its_row(backend: str, device: torch.device) -> None:
    pred = torch.tensor([[0.0, 0, 4, 4], [0, NAN, 4, 4]], device=device, requires_grad=True)
    target = torch.tensor([[1.0, 1, 5, 5], [1, 1, 5, 5]], device=device)
    for kind in KINDS:
        loss = loss_of(pred, target, kind, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        assert torch.isnan(loss).tolist() == [False, True]
        assert torch.isnan(grad).any(1).tolist() == [False, True]


def test_weights_and_reductions(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred, target = (boxes(9, device, torch.float64, generator) for _ in range(2))
    rows = box_iou_loss(pred, target, reduction="none")
    weight = torch.rand(9, generator=generator, dtype=torch.float64).to(device)
    torch.testing.assert_close(box_iou_loss(pred, target, weight), (rows * weight).mean())
    torch.testing.assert_close(giou_loss(pred, target, weight, reduction="sum"), (rows * weight).sum())
    factor: Tensor = torch.tensor(3.0, device=device)
    mean = box_iou_loss(pred, target, avg_factor=factor)
    torch.testing.assert_close(mean, rows.sum() / (3 + 2**-23), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r'^avg_factor can not be used with reduction="sum"$'):
        box_iou_loss(pred, target, reduction="sum", avg_factor=3)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_input_stays_attached(kind: str, backend: str, device: torch.device) -> None:
    pred = torch.zeros(0, 4, device=device, requires_grad=True)
    target = torch.zeros(0, 4, device=device)
    assert loss_of(pred, target, kind, reduction="none").shape == (0,)
    assert torch.isnan(loss_of(pred, target, kind))
    for arguments in ({"reduction": "sum"}, {"avg_factor": 1.0}):
        loss = loss_of(pred, target, kind, **arguments)
        assert loss == 0 and loss.requires_grad
        loss.backward()
        assert pred.grad is not None and pred.grad.shape == (0, 4)


def test_mixed_dtypes_and_autocast(backend: str, device: torch.device, generator: torch.Generator) -> None:
    target = boxes(9, device, torch.float32, generator)
    pred = (target + 3).half().requires_grad_()
    want = box_iou_loss(pred.float(), target)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = box_iou_loss(pred, target.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    got.backward()
    assert pred.grad is not None and pred.grad.dtype == torch.float16


BOXES = torch.zeros(7, 4)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("pred [N, 5]", {"pred": torch.zeros(7, 5)}, ValueError, "`pred` must have shape [N, 4], got [7, 5]"),
    ("pred [4]", {"pred": torch.zeros(4)}, ValueError, "`pred` must have shape"),
    ("target short", {"target": BOXES[:6]}, ValueError, "`target` must have shape [N, 4] = [7, 4], got [6, 4]"),
    ("target complex", {"target": BOXES * 1j}, TypeError, "`target` must have one of the dtypes"),
    ("weight [N, 1]", {"weight": BOXES[:, :1]}, ValueError, "`weight` must have shape [N] = [7], got [7, 1]"),
    (
        "kind",
        {"kind": "wiou"},
        ValueError,
        "`kind` must be one of 'iou', 'giou', 'diou', 'ciou', 'eiou', 'siou', 'mpdiou', got",
    ),
    ("no size", {"kind": "mpdiou"}, ValueError, '`image_size` must be (height, width) for kind="mpdiou", got None'),
    ("size 0", {"kind": "mpdiou", "image_size": (0, 4)}, ValueError, "`image_size[0]` must be > 0, got 0"),
    ("smooth point", {"kind": "eiou", "smooth_point": 0}, ValueError, "`smooth_point` must be > 0, got 0"),
    ("eps", {"eps": -1.0}, ValueError, "`eps` must be >= 0, got -1.0"),
    ("reduction", {"reduction": "max"}, ValueError, "`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ("device", {"target": BOXES.to("meta")}, ValueError, "`target` must be on the device of `pred`, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "error", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_said(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        box_iou_loss(**{"pred": BOXES, "target": BOXES, **change})
    assert str(raised.value).startswith("gfl_ops.box_iou_loss: ")
    assert text in str(raised.value)


def test_boxes_that_touch_are_drawn_together(backend: str, device: torch.device) -> None:
    """The gradient at the bound of an overlap, which torch's own clamp has had in some versions and not in others."""
    pred = torch.tensor([[0.0, 0.0, 2.0, 2.0]], device=device, requires_grad=True)
    target = torch.tensor([[2.0, 0.0, 4.0, 2.0]], device=device)
    (gradient,) = torch.autograd.grad(box_iou_loss(pred, target, kind="iou", reduction="sum"), pred)
    # d(overlap)/d(right side) is the height of 2, over a union of 8.
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[0.0, 0.0, -0.25, 0.0]]))
