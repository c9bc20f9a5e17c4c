# SPDX-License-Identifier: Apache-2.0
"""The real torchvision against ours under its names, and its RetinaNet and FCOS with ours inside."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peers.compare import assert_as_exact, evaluate
from torch import Tensor

import gfl_ops
from gfl_ops.compat import torchvision as compat
from gfl_ops.core.random_inputs import boxes as draw_boxes

pytestmark = pytest.mark.peers
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)

import torchvision  # noqa: E402
from torchvision.models import detection, resnet18  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    compat.unpatch()


def test_it_says_what_it_replaces_and_puts_it_back() -> None:
    names = ("sigmoid_focal_loss", "generalized_box_iou_loss", "nms", "batched_nms")
    holders = [torchvision.ops, torchvision.ops.boxes, detection.fcos, detection.retinanet, detection._utils]
    before = [dict(vars(h)) for h in holders]
    replaced = compat.patch()
    print(replaced)
    assert replaced == [f"torchvision.ops.{name}" for name in names] == compat.patch()
    ours = detection.fcos.sigmoid_focal_loss
    assert ours is detection.retinanet.sigmoid_focal_loss is torchvision.ops.sigmoid_focal_loss
    with pytest.raises(TypeError, match=r"gfl_ops\.sigmoid_focal_loss"):
        ours(None, None)
    with pytest.raises(TypeError, match=r"gfl_ops\.batched_nms"):
        detection.fcos.box_ops.batched_nms(None, None, None, 0.5)
    with pytest.raises(TypeError, match=r"gfl_ops\.generalized_box_iou_loss"):
        detection._utils.generalized_box_iou_loss(None, None)
    assert compat.unpatch() == replaced and compat.unpatch() == []
    assert [dict(vars(h)) for h in holders] == before
    assert compat.nms is gfl_ops.nms and gfl_ops.nms.__module__.startswith("gfl_ops")


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: list[Tensor], share: float) -> None:
    truth = evaluate(theirs, [leaf.double() for leaf in leaves])
    assert_as_exact(evaluate(ours, leaves), evaluate(theirs, leaves), truth, share)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["mixed", "negative", "empty"])
def test_sigmoid_focal_loss(case: str, dtype: torch.dtype, reduction: str, generator: torch.Generator) -> None:
    shape = (0 if case == "empty" else 33, 5)
    logits = (torch.randn(shape, generator=generator) * 3).to(dtype)
    targets = (torch.rand(shape, generator=generator) < (0.2 if case == "mixed" else 0)).to(dtype)
    if case == "empty" and reduction == "mean":
        assert compat.sigmoid_focal_loss(logits, targets, reduction=reduction).isnan()
        return

    def call(function: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, targets.to(x.dtype), reduction=reduction)

    # Sums of 165 losses.
    compare(call(compat.sigmoid_focal_loss), call(torchvision.ops.sigmoid_focal_loss), [logits], 20.0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 41])
def test_generalized_box_iou_loss(n: int, dtype: torch.dtype, reduction: str, generator: torch.Generator) -> None:
    target = draw_boxes(n, CPU, torch.float32, generator, extent=60.0)
    pred = target + torch.randn(n, 4, generator=generator) * 3
    pred[:, 2:] = torch.maximum(pred[:, 2:], pred[:, :2] + 1)
    # Where sides coincide after rounding both halve the gradient; eps is added there: 1e-7 of a square pixel.
    leaves = [pred.to(dtype), target.to(dtype)]
    theirs = evaluate(lambda p, t: torchvision.ops.generalized_box_iou_loss(p, t, reduction), leaves)
    ours = evaluate(lambda p, t: compat.generalized_box_iou_loss(p, t, reduction), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        tolerance = 1e-5 if dtype in (torch.float64, torch.float32) else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_generalized_box_iou_loss_takes_their_shapes(generator: torch.Generator) -> None:
    a = draw_boxes(6, CPU, torch.float32, generator, extent=60.0)
    b = a + 1
    for shape in ((4,), (6, 4), (2, 3, 4)):
        pair = [x[: 1 if shape == (4,) else 6].reshape(shape) for x in (a, b)]
        want = torchvision.ops.generalized_box_iou_loss(*pair)
        torch.testing.assert_close(compat.generalized_box_iou_loss(*pair), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`boxes2` must have a shape that broadcasts"):
        compat.generalized_box_iou_loss(a, b[:3])
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        compat.generalized_box_iou_loss(a, b, reduction="all")


def test_under_autocast(generator: torch.Generator) -> None:
    logits = torch.randn(9, 4, generator=generator).bfloat16()
    targets = (torch.rand(9, 4, generator=generator) < 0.3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = compat.sigmoid_focal_loss(logits, targets, reduction="sum")
        theirs = torchvision.ops.sigmoid_focal_loss(logits, targets, reduction="sum")
    truth = torchvision.ops.sigmoid_focal_loss(logits.double(), targets.double(), reduction="sum")
    assert abs(ours - truth) <= abs(theirs - truth) + 1e-5 * truth


def targets_of(counts: list[int], g: torch.Generator) -> list[dict[str, Tensor]]:
    return [
        {
            "boxes": draw_boxes(n, CPU, torch.float32, g, extent=100.0),
            "labels": torch.randint(1, 5, (n,), generator=g),
        }
        for n in counts
    ]


def detector(name: str) -> torch.nn.Module:
    """A small one of torchvision's own parts."""
    backbone = torch.nn.Sequential(*list(resnet18().children())[:-3])
    backbone.out_channels = 256
    make = {"fcos": detection.FCOS, "retinanet": detection.RetinaNet}[name]
    sizes = ((32,),) if name == "fcos" else ((16, 32, 64),)
    anchors = AnchorGenerator(sizes, ((1.0,),))
    model = make(backbone, num_classes=5, anchor_generator=anchors, min_size=128, max_size=128, score_thresh=0.01)
    model.head.classification_head.cls_logits.bias.data.fill_(-1.0)
    model.head.classification_head.cls_logits.weight.data.normal_(0, 0.05)
    if name == "retinanet":
        model.head.regression_head._loss_type = "giou"
    return model


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
@pytest.mark.parametrize("counts", [[5, 3], [0, 0]], ids=["boxes", "no-boxes"])
def test_a_detector_trains_and_finds_the_same(name: str, counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = detector(name)
    g = torch.Generator().manual_seed(seed)
    images, targets = [torch.rand(3, 128, 128, generator=g) for _ in counts], targets_of(counts, g)

    def step() -> dict[str, Tensor]:
        model.train()
        model.zero_grad()
        losses = model(images, targets)
        sum(losses.values()).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {k: v.detach() for k, v in losses.items()} | grads

    state = {k: v.clone() for k, v in model.state_dict().items()}
    theirs = step()
    model.load_state_dict(state)
    with compat.patch():
        ours = step()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # Sums of some thousand terms in another order, through the convolutions.
        atol = 1e-5 * float(value.abs().max()) + 1e-7
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=atol, msg=lambda m, k=key: f"{k}: {m}")

    model.eval()
    with torch.no_grad():
        theirs = model(images)
        with compat.patch():
            ours = model(images)
    for a, b in zip(ours, theirs, strict=True):
        # Their offsets between classes cost low bits, so a close pair may be decided otherwise.
        assert abs(len(a["scores"]) - len(b["scores"])) <= 1 and len(b["scores"]) > 0
        if len(a["scores"]) == len(b["scores"]):
            torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=1e-3)


class Suppression(torch.nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
        return torchvision.ops.batched_nms(boxes, scores, classes, 0.5)


def test_torch_jit_scripts_and_traces_what_it_did(generator: torch.Generator) -> None:
    boxes = draw_boxes(20, CPU, torch.float32, generator, extent=40.0)
    given = (boxes, torch.rand(20, generator=generator), torch.arange(20) % 3)
    want = torchvision.ops.batched_nms(*given, 0.5)
    with compat.patch():
        for graph in (torch.jit.script(Suppression()), torch.jit.trace(Suppression(), given)):
            assert "gfl" not in str(graph.inlined_graph)
            assert torch.equal(graph(*given).sort().values, want.sort().values)
        torch.jit.script(detection.fcos_resnet50_fpn(weights=None, weights_backbone=None).eval())
        for name in ("sigmoid_focal_loss", "generalized_box_iou_loss", "nms"):
            torch.jit.script(getattr(torchvision.ops, name))
        with pytest.raises(TypeError, match=r"gfl_ops\.nms"):
            torchvision.ops.nms(None, None, 0.5)
