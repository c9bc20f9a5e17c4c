# SPDX-License-Identifier: Apache-2.0
"""Assignment and head loss against those of the real mmdet 3.3.0.

The loss is compared to rtol 1e-5: mmdet divides by its norms plus 1.19e-07 and reads a norm in fp32. An element of a
gradient is a difference of larger numbers, hence beside it 1e-6 of the map's largest element.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peers import mmdet_stub
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.core.random_inputs import boxes as draw_boxes

pytestmark = pytest.mark.peers
if importlib.util.find_spec("mmdet") is None:
    pytest.skip(
        "mmdet is not installed; tests/support/peers/requirements.txt says what is needed", allow_module_level=True
    )

mmdet_stub.install()
from mmdet.models.dense_heads import GFLHead  # noqa: E402
from mmdet.models.task_modules.assigners import ATSSAssigner  # noqa: E402
from mmdet.models.task_modules.prior_generators import AnchorGenerator  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

BACKENDS = ["reference"] + (["native"] if backends.unavailable("native", "atss", "cpu") is None else [])
STRIDES = [8, 16, 32, 64, 128]


def sizes_of(height: int, width: int) -> list[tuple[int, int]]:
    return [(-(-height // s), -(-width // s)) for s in STRIDES]


def anchors(height: int, width: int) -> list[Tensor]:
    generator = AnchorGenerator(ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=STRIDES)
    return generator.grid_priors(sizes_of(height, width), device="cpu")


def undecided(levels: list[Tensor], gt: Tensor, topk: int = 9) -> Tensor:
    """Boxes whose nearest cells mmdet leaves to its sort, or whose threshold lies within rounding of an IoU."""
    centre = (gt[:, :2] + gt[:, 2:]) / 2
    ties = torch.zeros(len(gt), dtype=torch.bool)
    candidates = []
    assigner = ATSSAssigner(topk=topk)
    for prior in levels:
        points = (prior[:, :2] + prior[:, 2:]) / 2
        distance, order = (points[:, None] - centre).pow(2).sum(-1).sqrt().sort(dim=0)
        k = min(topk, len(prior))
        if len(prior) > k:
            ties |= distance[k] == distance[k - 1]
        overlap = assigner.iou_calculator(prior, gt)
        candidates.append(overlap.gather(0, order[:k]))
    overlap = torch.cat(candidates).double()
    threshold = overlap.mean(0) + overlap.std(0)
    return ties | ((overlap - threshold).abs() < 1e-6).any(0)


def compare(height: int, width: int, gt: Tensor, labels: Tensor, backend: str) -> tuple[int, int, int]:
    """Positives, boxes that mmdet leaves undecided, and locations that differ, all of them because of such a box."""
    levels = anchors(height, width)
    with gfl_ops.set_backend(backend):
        got = gfl_ops.atss_assign(sizes_of(height, width), STRIDES, gt[None], labels[None])
    truth = InstanceData(bboxes=gt, labels=labels)
    want = ATSSAssigner(topk=9).assign(InstanceData(priors=torch.cat(levels)), [len(p) for p in levels], truth)
    matched, slot = got.matched[0], want.gt_inds - 1
    ambiguous = torch.cat([undecided(levels, gt), torch.tensor([False])])
    different = matched != slot
    assert (ambiguous[matched] | ambiguous[slot])[different].all(), "a difference that no tie explains"
    same = ~different & (slot >= 0)
    assert torch.equal(got.labels[0][same], want.labels[same])
    torch.testing.assert_close(got.iou[0][same], want.max_overlaps[same], rtol=0, atol=1e-6)
    return int((slot >= 0).sum()), int(ambiguous.sum()), int(different.sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounded", [False, True], ids=["drawn", "drawn-integer"])
def test_assignment_of_drawn_boxes(backend: str, rounded: bool, generator: torch.Generator) -> None:
    total = [0, 0, 0]
    for count in (1, 7, 40, 100):
        gt = draw_boxes(count, torch.device("cpu"), torch.float32, generator, extent=800.0)
        gt = gt.round() if rounded else gt
        gt[:, 2:] = torch.maximum(gt[:, 2:], gt[:, :2] + 1)
        labels = torch.randint(0, 80, (count,), generator=generator)
        total = [a + b for a, b in zip(total, compare(608, 800, gt, labels, backend))]
    print(f"positives {total[0]}, undecided boxes {total[1]} of 148, different locations {total[2]}")
    assert total[0] > 300


@pytest.mark.parametrize("backend", BACKENDS)
def test_assignment_of_real_boxes(backend: str, data: Path) -> None:
    """The photos' boxes, resized to short side 800, long side at most 1333, padded to 32."""
    source = json.loads((data / "coco_val2017_47" / "instances_val2017_47.json").read_text())
    total, boxes = [0, 0, 0], 0
    for image in source["images"]:
        found = [a for a in source["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        if not found:
            continue
        short, long = sorted((image["height"], image["width"]))
        scale = min(800 / short, 1333 / long)
        height, width = int(image["height"] * scale + 0.5), int(image["width"] * scale + 0.5)
        x, y, w, h = torch.tensor([a["bbox"] for a in found]).unbind(1)
        gt = torch.stack([x, y, x + w, y + h], 1) * torch.tensor([width / image["width"], height / image["height"]] * 2)
        labels = torch.tensor([a["category_id"] % 80 for a in found])
        boxes += len(found)
        padded = -(-height // 32) * 32, -(-width // 32) * 32
        total = [a + b for a, b in zip(total, compare(*padded, gt, labels, backend))]
    print(f"positives {total[0]}, undecided boxes {total[1]} of {boxes}, different locations {total[2]}")
    assert total[0] > 1000 and total[2] < 0.01 * total[0]


class Head(GFLHead):
    """Takes fp64 maps, which mmdet's own targets, always fp32, do not go with."""

    def loss_by_feat_single(self, anchors, cls_score, bbox_pred, labels, label_weights, bbox_targets, *rest, **named):
        targets = (t.to(cls_score.dtype) for t in (anchors, label_weights, bbox_targets))
        anchors, label_weights, bbox_targets = targets
        return super().loss_by_feat_single(
            anchors, cls_score, bbox_pred, labels, label_weights, bbox_targets, *rest, **named
        )


def head(classes: int) -> GFLHead:
    config = ConfigDict(assigner={"type": "ATSSAssigner", "topk": 9}, allowed_border=-1, pos_weight=-1, debug=False)
    return Head(
        num_classes=classes,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        norm_cfg={"type": "GN", "num_groups": 4},
        anchor_generator={
            "type": "AnchorGenerator",
            "ratios": [1.0],
            "octave_base_scale": 8,
            "scales_per_octave": 1,
            "strides": STRIDES,
        },
        loss_cls={"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0},
        loss_dfl={"type": "DistributionFocalLoss", "loss_weight": 0.25},
        loss_bbox={"type": "GIoULoss", "loss_weight": 2.0},
        reg_max=16,
        train_cfg=config,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", ["boxes", "few-confident", "no-boxes"])
def test_head_loss(backend: str, dtype: torch.dtype, case: str, generator: torch.Generator) -> None:
    """Losses and gradients of a batch of three: one padded image, one without boxes, one with many."""
    classes, height, width = 20, 256, 320
    sizes = sizes_of(height, width)
    bias = -4.0 if case == "few-confident" else 0.0  # Σ w below 1: the norm is cut at 1

    def maps(channels: int, shift: float) -> list[Tensor]:
        drawn = [
            torch.randn((3, channels, h, w), generator=generator, dtype=torch.float64) * 1.5 + shift for h, w in sizes
        ]
        return [m.to(dtype).requires_grad_() for m in drawn]

    scores, distributions = maps(classes, bias * 2), maps(68, 0.0)
    counts = [0, 0, 0] if case == "no-boxes" else [6, 0, 25 if case == "boxes" else 1]
    gt = torch.zeros(3, max(counts) + 1, 4)
    labels = torch.full(gt.shape[:2], -1)
    for i, count in enumerate(counts):
        gt[i, :count] = draw_boxes(count, torch.device("cpu"), torch.float32, generator, extent=250.0)
        labels[i, :count] = torch.randint(0, classes, (count,), generator=generator)
    shapes = [(192, 320), (256, 320), (256, 320)]

    truth = [InstanceData(bboxes=gt[i, :n], labels=labels[i, :n]) for i, n in enumerate(counts)]
    metas = [{"img_shape": s, "pad_shape": s} for s in shapes]
    want = head(classes).loss_by_feat(scores, distributions, truth, metas)
    sums = [sum(want[k]) for k in ("loss_cls", "loss_bbox", "loss_dfl")]
    factors = torch.rand(3, generator=generator).double() + 0.5
    leaves = [*scores, *distributions]
    want_grads = torch.autograd.grad(sum(f * s for f, s in zip(factors, sums)), leaves)

    with gfl_ops.set_backend(backend):
        assignment = gfl_ops.atss_assign(sizes, STRIDES, gt, labels, valid_sizes=torch.tensor(shapes))
        got = gfl_ops.gfl_loss(scores, distributions, STRIDES, assignment, gt)
        grads = torch.autograd.grad(sum(f * s for f, s in zip(factors, got[:3])), leaves)
        norms = gfl_ops.head_loss_norms(scores, assignment)
        again = gfl_ops.gfl_loss(
            scores, distributions, STRIDES, assignment, gt, cls_norm=norms[0], box_norm=norms[1].clamp(min=1)
        )
    for name, g, w in zip(("cls", "box", "dfl"), got, sums):
        torch.testing.assert_close(g, w.to(dtype), rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    for i, (g, w) in enumerate(zip(grads, want_grads)):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6 * w.abs().max().item() + 1e-12,
                                   msg=lambda m, i=i: f"gradient {i}: {m}")  # fmt: skip
    for a, b in zip(again, got):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert (case == "no-boxes") == (got.num_pos.item() == 0)
    if case != "boxes":
        assert got.box_weight < 1 or case == "no-boxes"
