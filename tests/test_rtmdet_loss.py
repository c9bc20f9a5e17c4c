# SPDX-License-Identifier: Apache-2.0
"""RTMDet's loss against the assigner and the two losses that it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.ops.head.assign import draw_objects, draw_predictions
from gfl_ops.ops.head.task_aligned_reference import locations

pytestmark = pytest.mark.usefixtures("everywhere")

BACKENDS = ["reference"] + (["native"] if backends.unavailable("native", "yolo_loss", "cpu") is None else [])
SIZES, STRIDES, CLASSES = [(12, 16), (6, 8), (3, 4)], [8.0, 16.0, 32.0], 5


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with gfl_ops.set_backend(request.param):
        yield request.param


def points(offset: float) -> Tensor:
    return locations([n for size in SIZES for n in size], STRIDES, [offset] * 3, torch.device("cpu"))


def maps(rows: Tensor) -> list[Tensor]:
    """Of the levels, ``[B, A, channels]`` split."""
    parts = rows.transpose(1, 2).split([h * w for h, w in SIZES], 2)
    return [part.unflatten(2, size).contiguous() for part, size in zip(parts, SIZES)]


def drawn(generator: torch.Generator, dtype: torch.dtype, offset: float = 0.0) -> dict[str, Any]:
    """Distances to the sides of boxes that are near the objects."""
    gt_boxes, gt_labels = draw_objects(2, 8, CLASSES, 100.0, torch.device("cpu"), generator)
    gt_labels[0, 0] = 1
    at = points(offset)
    scores, boxes = draw_predictions(gt_boxes, at, CLASSES, torch.float64, generator)
    distance = torch.cat([at - boxes[..., :2], boxes[..., 2:] - at], -1)
    return {
        "cls_scores": maps((scores * 8 - 6).to(dtype)),
        "reg_preds": maps(distance.to(dtype)),
        "strides": STRIDES,
        "gt_boxes": gt_boxes,
        "gt_labels": gt_labels,
    }


def flat(levels: list[Tensor]) -> Tensor:
    return torch.cat([m.flatten(2) for m in levels], 2).transpose(1, 2)


def composed(given: dict[str, Any], offset: float, beta: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The two losses by the functions for each of them, in fp64."""
    x, distance, at = flat(given["cls_scores"]), flat(given["reg_preds"]).double(), points(offset).double()
    boxes = torch.cat([at - distance[..., :2], at + distance[..., 2:]], -1)
    objects = given["gt_boxes"], given["gt_labels"]
    found = gfl_ops.dynamic_soft_label_assign(
        x, boxes.detach(), SIZES, STRIDES, *objects, center_offset=offset, **options
    )
    positive = found.labels >= 0
    norm = found.iou.double().sum().clamp(min=1)
    target = found.labels.flatten(), found.iou.double().flatten()
    cls = gfl_ops.quality_focal_loss(x.double().flatten(0, 1), target, beta=beta, reduction="sum") / norm
    image = positive.nonzero()[:, 0]
    true = given["gt_boxes"].double()[image, found.matched[positive]]
    box = gfl_ops.giou_loss(boxes[positive], true, found.iou.double()[positive], eps=1e-6, reduction="sum") / norm
    return cls, 2 * box


def leaves_of(given: dict[str, Any]) -> list[Tensor]:
    for name in ("cls_scores", "reg_preds"):
        given[name] = [m.detach().requires_grad_() for m in given[name]]
    return [*given["cls_scores"], *given["reg_preds"]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("offset", "beta", "options"),
    [
        (0.0, 2.0, {}),
        (0.0, 2.0, {"variant": "mmyolo"}),
        (0.5, 1.5, {"topk": 5, "iou_weight": 2.0, "soft_center_radius": 2.0}),
    ],
    ids=["mmdet's", "mmyolo's", "others"],
)
def test_it_is_the_composition(
    offset: float,
    beta: float,
    options: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    generator: torch.Generator,
) -> None:
    given = drawn(generator, dtype, offset)
    leaves = leaves_of(given)
    got = gfl_ops.rtmdet_loss(**given, center_offset=offset, beta=beta, **options)
    want = composed(given, offset, beta, options)
    assert int(got.num_pos) > 5 and got.cls.dtype == dtype
    for g, w in zip(got[:2], want):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=0)
    # Different factors, so that the two losses are told apart.
    found, wanted = (torch.autograd.grad(0.7 * cls - 1.3 * box, leaves) for cls, box in (got[:2], want))
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_sum_is_the_one_of_its_parts(backend: str, generator: torch.Generator) -> None:
    """From the forward pass where 1 arrives, else computed anew."""
    given = drawn(generator, torch.float32)
    leaves = leaves_of(given)

    def gradients(cls: float, box: float) -> tuple[Tensor, ...]:
        got = gfl_ops.rtmdet_loss(**given)
        return torch.autograd.grad(cls * got.cls + box * got.box, leaves)

    for whole, *each in zip(gradients(1.0, 1.0), gradients(1.0, 0.0), gradients(0.0, 1.0), strict=True):
        torch.testing.assert_close(whole, each[0] + each[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["no-slot", "padded", "beyond", "nan", "far"])
def test_without_positives(kind: str, backend: str, generator: torch.Generator) -> None:
    given = drawn(generator, torch.float32)
    if kind == "no-slot":
        given["gt_boxes"], given["gt_labels"] = given["gt_boxes"][:, :0], given["gt_labels"][:, :0]
    elif kind in ("nan", "far"):
        given["gt_boxes"] = given["gt_boxes"] + float({"nan": "nan", "far": "1e6"}[kind])
    else:
        given["gt_labels"] = given["gt_labels"] * 0 + {"padded": -1, "beyond": CLASSES}[kind]
    leaves = leaves_of(given)
    got = gfl_ops.rtmdet_loss(**given)
    assert got.num_pos == got.score_sum == got.box == 0
    x = flat(given["cls_scores"]).flatten(0, 1)
    none = torch.full((len(x),), CLASSES), torch.zeros(len(x))
    torch.testing.assert_close(got.cls, gfl_ops.quality_focal_loss(x, none, reduction="sum"), rtol=1e-5, atol=0)
    (got.cls + got.box).backward()
    assert all(m.grad is not None and m.grad.all() for m in leaves[:3])
    assert all(m.grad is not None and not m.grad.any() for m in leaves[3:])


def test_one_graph_and_the_half_types(generator: torch.Generator) -> None:
    given = drawn(generator, torch.float32)
    torch._dynamo.reset()
    want = gfl_ops.rtmdet_loss(**given)
    got = torch.compile(lambda: tuple(gfl_ops.rtmdet_loss(**given)), fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    for dtype in (torch.float16, torch.bfloat16):
        half = {**given, "cls_scores": [m.to(dtype) for m in given["cls_scores"]]}
        same = {**given, "cls_scores": [m.float() for m in half["cls_scores"]]}
        for g, w in zip(gfl_ops.rtmdet_loss(**half), gfl_ops.rtmdet_loss(**same)):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"reg_preds": []}, ValueError, "`reg_preds` must"),
        (
            {"reg_preds": [torch.zeros(2, 64, *size) for size in SIZES]},
            ValueError,
            r"`reg_preds` must have shape \[B, 4, ",
        ),
        ({"strides": [8.0]}, ValueError, "`strides` must"),
        ({"gt_boxes": torch.zeros(1, 8, 4)}, ValueError, r"`gt_boxes` must have shape \[B, G, 4\]"),
        ({"gt_labels": torch.zeros(2, 8)}, TypeError, "`gt_labels` must"),
        ({"topk": 0}, ValueError, "`topk` must be >= 1"),
        ({"iou_weight": -1.0}, ValueError, "`iou_weight` must be >= 0"),
        ({"variant": "nanodet"}, ValueError, "`variant` must be one of 'mmdet', 'mmyolo'"),
        ({"beta": -1.0}, ValueError, "`beta` must be >= 0"),
        ({"loss_weights": (1.0, 2.0, 3.0)}, ValueError, "`loss_weights` must hold two numbers"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], error: type, text: str, generator: torch.Generator) -> None:
    with pytest.raises(error, match="gfl_ops.rtmdet_loss: " + text):
        gfl_ops.rtmdet_loss(**(drawn(generator, torch.float32) | change))
