# SPDX-License-Identifier: Apache-2.0
"""The YOLO loss against a dense composition of torch's losses, and what is special to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.core.random_inputs import boxes as draw_boxes

pytestmark = pytest.mark.usefixtures("everywhere")

BACKENDS = ["reference"] + (["native"] if backends.unavailable("native", "yolo_loss", "cpu") is None else [])
STRIDES = [8.0, 16.0, 32.0]
SIZES = [(12, 16), (6, 8), (3, 4)]
CLASSES = 5


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with gfl_ops.set_backend(request.param):
        yield request.param


def drawn(generator: torch.Generator, bins: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Maps whose boxes are as large as some objects, and objects, one slot of the second image empty."""

    def maps(channels: int, scale: float) -> list[Tensor]:
        shapes = [(2, channels, h, w) for h, w in SIZES]
        return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for shape in shapes]

    sides = maps(4 * bins, 1.5) if bins > 1 else [m.abs() + 0.5 for m in maps(4, 2.0)]
    gt = draw_boxes(8, torch.device("cpu"), torch.float32, generator, extent=100.0).view(2, 4, 4)
    labels = torch.randint(0, CLASSES, (2, 4), generator=generator)
    labels[1, 2] = -1
    return sides, maps(CLASSES, 1.5), STRIDES, gt, labels


def rows(maps: list[Tensor]) -> Tensor:
    return torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)


def composed(
    sides: list[Tensor],
    scores: list[Tensor],
    strides: list[float],
    gt: Tensor,
    labels: Tensor,
    bins: int,
    **options: Any,
) -> dict[str, Tensor]:
    """The losses in fp64 with dense targets, by the assignment of the operator alone."""
    x, raw = rows(scores).double(), rows(sides).double().unflatten(2, (4, bins))
    centre = torch.cat([torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1).view(-1, 2)
                        for h, w in SIZES]).double() + 0.5  # fmt: skip
    stride = torch.cat([torch.full((h * w, 1), s, dtype=torch.float64) for (h, w), s in zip(SIZES, strides)])
    distance = raw[..., 0] if bins == 1 else (raw.softmax(-1) * torch.arange(bins)).sum(-1)
    boxes = torch.cat([centre - distance[..., :2], centre + distance[..., 2:]], -1)
    found = gfl_ops.task_aligned_assign(
        x.detach().sigmoid(), boxes.detach() * stride, SIZES, strides, gt, labels, **options
    )
    positive, slot = found.labels >= 0, found.matched.clamp(min=0)
    target = torch.zeros_like(x)
    target[positive, found.labels[positive]] = found.scores[positive].double()
    score_sum = target.sum()
    norm = score_sum.clamp(min=1)
    cls = F.binary_cross_entropy_with_logits(x, target, reduction="sum")
    to_learn = gt.double().gather(1, slot[..., None].expand(-1, -1, 4)) / stride
    p, t, s = boxes[positive], to_learn[positive], found.scores[positive].double()

    inner = (torch.minimum(p[:, 2:], t[:, 2:]) - torch.maximum(p[:, :2], t[:, :2])).clamp(min=0).prod(1)
    iou = inner / ((p[:, 2:] - p[:, :2]).prod(1) + (t[:, 2:] - t[:, :2]).prod(1) - inner + 1e-7)
    outer = ((torch.maximum(p[:, 2:], t[:, 2:]) - torch.minimum(p[:, :2], t[:, :2])) ** 2).sum(1) + 1e-7
    apart = ((p[:, :2] + p[:, 2:] - t[:, :2] - t[:, 2:]) ** 2).sum(1) / 4 / outer
    angle = [torch.atan((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1] + 1e-7)) for b in (p, t)]
    v = 4 / math.pi**2 * (angle[0] - angle[1]) ** 2
    ciou = iou - apart - v * (v / (v - iou + 1 + 1e-7)).detach()

    side = torch.cat([centre - to_learn[..., :2], to_learn[..., 2:] - centre], -1)[positive]
    if bins == 1:
        image = torch.tensor([SIZES[0][1] * strides[0], SIZES[0][0] * strides[0]] * 2, dtype=torch.float64)
        dfl = ((distance[positive] - side).abs() * stride.expand(2, -1, 1)[positive] / image).mean(1)
    else:
        side = side.clamp(0, bins - 1.01)
        left = side.long()
        log_p = raw[positive].log_softmax(-1)
        below, above = (log_p.gather(2, (left + i)[..., None])[..., 0] for i in (0, 1))
        dfl = -(below * (left + 1 - side) + above * (side - left)).mean(1)
    losses = {"box": 7.5 * ((1 - ciou) * s).sum() / norm, "cls": 0.5 * cls / norm, "dfl": 1.5 * (dfl * s).sum() / norm}
    return losses | {"num_pos": positive.sum().double(), "score_sum": score_sum}


def leaves_of(maps: list[Tensor]) -> list[Tensor]:
    return [m.detach().requires_grad_() for m in maps]


@pytest.mark.parametrize("options", [{}, {"topk": 7, "topk2": 1}, {"min_side": 0.0}], ids=["many", "one", "as-drawn"])
@pytest.mark.parametrize("bins", [16, 5, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_it_is_the_composition(
    dtype: torch.dtype, bins: int, options: dict[str, Any], backend: str, generator: torch.Generator
) -> None:
    sides, scores, *rest = drawn(generator, bins, dtype)
    sides, scores = leaves_of(sides), leaves_of(scores)
    got = gfl_ops.yolo_loss(sides, scores, *rest, bins=bins, **options)
    want = composed(sides, scores, *rest, bins=bins, **options)
    assert int(got.num_pos) > 0
    # The scores of an fp64 call are not rounded to fp32, those of the composition are.
    for name, value in got._asdict().items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    # Different factors, so that the three losses are told apart.
    factors = {"box": 0.7, "cls": -1.3, "dfl": 2.1}
    found, wanted = (
        torch.autograd.grad(sum(f * losses[n] for n, f in factors.items()), sides + scores)  # type: ignore[arg-type]
        for losses in (got._asdict(), want)
    )
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("bins", [16, 1])
def test_the_gradient_of_the_sum_is_the_one_of_its_parts(bins: int, backend: str, generator: torch.Generator) -> None:
    """From the forward pass where 1 arrives, else computed anew."""
    sides, scores, *rest = drawn(generator, bins, torch.float32)
    leaves = leaves_of(sides + scores)

    def gradients(factors: tuple[float, float, float]) -> list[Tensor]:
        losses = gfl_ops.yolo_loss(leaves[:3], leaves[3:], *rest, bins=bins)
        return list(torch.autograd.grad(sum(f * x for f, x in zip(factors, losses[:3])), leaves))  # type: ignore[arg-type]

    parts = [gradients(f) for f in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
    for whole, *each in zip(gradients((1.0, 1.0, 1.0)), *parts, strict=True):
        torch.testing.assert_close(whole, each[0] + each[1] + each[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("labels", ["none", "no-slot", "padded", "beyond", "nan"])
def test_without_positives(labels: str, backend: str, generator: torch.Generator) -> None:
    """The background learns 0; boxes and distributions have a gradient of 0."""
    sides, scores, strides, gt, given = drawn(generator, 16, torch.float32)
    if labels == "no-slot":
        gt, given = gt[:, :0], given[:, :0]
    elif labels == "nan":
        gt = gt * float("nan")
    else:
        gt = gt * 0 if labels == "none" else gt
        given = given * 0 + {"none": 1, "padded": -1, "beyond": CLASSES}[labels]
    leaves = leaves_of(sides + scores)
    got = gfl_ops.yolo_loss(leaves[:3], leaves[3:], strides, gt + (1e6 if labels == "none" else 0), given)
    assert got.num_pos == got.score_sum == got.box == got.dfl == 0
    zeros = torch.zeros_like(rows(scores))
    want = 0.5 * F.binary_cross_entropy_with_logits(rows(scores), zeros, reduction="sum")
    torch.testing.assert_close(got.cls, want, rtol=1e-5, atol=0)
    (got.box + got.dfl + got.cls).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves[:3])
    assert all(leaf.grad is not None and leaf.grad.all() for leaf in leaves[3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_types_are_widened(dtype: torch.dtype, backend: str, generator: torch.Generator) -> None:
    """Losses and their arithmetic are fp32; the scores that rank candidates are the head's own, rounded."""
    sides, scores, *rest = drawn(generator, 16, dtype)
    got = gfl_ops.yolo_loss(sides, scores, *rest)
    assert all(x.dtype == torch.float32 for x in got)
    want = gfl_ops.yolo_loss([m.double() for m in sides], [m.double() for m in scores], *rest)
    # A probability that is rounded to 2^-8 may select another of two candidates that are nearly as good.
    for g, w in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0.05, atol=0)
    mixed = gfl_ops.yolo_loss([m.float() for m in sides], scores, *rest)
    torch.testing.assert_close(mixed.cls, got.cls)


def test_memory_formats_and_one_map(backend: str, generator: torch.Generator) -> None:
    sides, scores, *rest = drawn(generator, 16, torch.float32)
    want = gfl_ops.yolo_loss(sides, scores, *rest)
    last = [[m.contiguous(memory_format=torch.channels_last) for m in maps] for maps in (sides, scores)]
    for g, w in zip(gfl_ops.yolo_loss(*last, *rest), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=0)


def test_it_compiles_into_one_graph(generator: torch.Generator) -> None:
    sides, scores, *rest = drawn(generator, 16, torch.float32)
    torch._dynamo.reset()

    def step(*maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(gfl_ops.yolo_loss(list(maps[:3]), list(maps[3:]), *rest))

    want = step(*sides, *scores)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*sides, *scores)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"bins": 0}, ValueError, "`bins` must be >= 1, got 0"),
        ({"bins": 17}, ValueError, r"`reg_preds` must have shape \[B, 4·bins, H, W\] = \[2, 68, 12, 16\]"),
        ({"gains": (1.0, 2.0)}, ValueError, "`gains` must hold three numbers"),
        ({"strides": [8.0, 16.0]}, ValueError, "`strides` must"),
        ({"gt_boxes": torch.zeros(1, 4, 4)}, ValueError, r"`gt_boxes` must have shape \[B, G, 4\]"),
        ({"gt_labels": torch.zeros(2, 3)}, TypeError, "`gt_labels` must"),
        ({"topk": 0}, ValueError, "`topk` must be >= 1"),
        ({"beta": 0.0}, ValueError, "`beta` must be > 0"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], error: type, text: str, generator: torch.Generator) -> None:
    sides, scores, strides, gt, labels = drawn(generator, 16, torch.float32)
    arguments = {"reg_preds": sides, "cls_scores": scores, "strides": strides, "gt_boxes": gt, "gt_labels": labels}
    with pytest.raises(error, match="gfl_ops.yolo_loss: " + text):
        gfl_ops.yolo_loss(**(arguments | change))


@pytest.mark.parametrize("function", ["yolo_loss", "rtmdet_loss"])
def test_what_counts_as_no_box(function: str, backend: str, generator: torch.Generator) -> None:
    """Padding, unknown classes, NaN and infinity; wherever they stand, the losses are those without them."""
    sides, scores, strides, gt, labels = drawn(generator, 1, torch.float32)
    gt, labels = gt.repeat(1, 2, 1), torch.cat([labels, labels], 1)
    labels[:, 0], labels[:, 1] = -9, CLASSES
    gt[:, 2, 1], gt[:, 3, 2] = float("nan"), float("inf")

    def losses(gt: Tensor, labels: Tensor) -> list[Tensor]:
        leaves = leaves_of(sides + scores)
        if function == "yolo_loss":
            found = gfl_ops.yolo_loss(leaves[:3], leaves[3:], strides, gt, labels, bins=1)[:3]
        else:
            pixels = [m * stride for m, stride in zip(leaves[:3], strides)]
            found = gfl_ops.rtmdet_loss(leaves[3:], pixels, strides, gt, labels)[:2]
        return [*found, *torch.autograd.grad(sum(found), leaves)]  # type: ignore[arg-type]

    got, want = losses(gt, labels), losses(gt[:, 4:], labels[:, 4:])
    assert want[0] > 0 and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_degenerate_boxes(backend: str, generator: torch.Generator) -> None:
    """Without an extent, turned around or vast: whatever they get, losses and gradients are numbers."""
    sides, scores, strides, gt, labels = drawn(generator, 16, torch.float32)
    gt[0, 0, 2:], gt[0, 1] = gt[0, 0, :2], gt[0, 1].roll(2)
    gt[0, 2] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    leaves = leaves_of(sides + scores)
    got = gfl_ops.yolo_loss(leaves[:3], leaves[3:], strides, gt, labels.clamp(min=0))
    (got.box + got.cls + got.dfl).backward()
    assert all(torch.isfinite(x) for x in got) and all(bool(torch.isfinite(m.grad).all()) for m in leaves)


@pytest.mark.skipif(len(BACKENDS) == 1, reason="the extension is not built")
def test_many_objects(generator: torch.Generator) -> None:
    """65 536 in an image, on every backend."""
    sides, scores, strides, *_ = drawn(generator, 4, torch.float32)
    gt = draw_boxes(2 * 65536, torch.device("cpu"), torch.float32, generator, extent=100.0).view(2, 65536, 4)
    labels = torch.randint(-1, CLASSES, (2, 65536), generator=generator)
    found = []
    for name in BACKENDS:
        with gfl_ops.set_backend(name):
            found.append(gfl_ops.yolo_loss(sides, scores, strides, gt, labels, bins=4))
    for reference, native in zip(*found, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-5, atol=0)
    assert int(found[0].num_pos) > 100
