# SPDX-License-Identifier: Apache-2.0
"""The assigners with a dynamic k of mmdet and mmyolo against ours, on drawn and on real boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peers import mmdet_stub
from peers.assignment_scenes import (
    FLAT,
    POINTS,
    SCENES,
    STRIDES,
    Cuts,
    Given,
    drawn,
    mmyolo_assigner,
    needs,
    stable_sort,
)
from torch import Tensor

from gfl_ops.compat import mmdet as compat
from gfl_ops.ops.head.dynamic_k_reference import grid_points

pytestmark = pytest.mark.peers

PRIORS = grid_points(FLAT, STRIDES, [0.5] * 3, torch.device("cpu"))


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    compat.unpatch()


def tied(g: torch.Generator) -> Given:
    """Equal scores and boxes of equal size, as a new head predicts; objects at whole cells, some of them the same."""
    scores, _, points, labels, gt, mask = drawn(g)
    gt = (gt / 16).round() * 16
    gt[0, 5:10], labels[0, 5:10] = gt[0, :5], labels[0, :5]
    boxes = torch.cat([points - 20, points + 20], -1).expand(3, -1, -1).contiguous()
    return [torch.full_like(scores, 0.25), boxes, points, labels, gt, mask]


def few(g: torch.Generator) -> Given:
    """Few objects, most of them too small for a location, which many predictions fit."""
    scores, boxes, points, labels, gt, mask = drawn(g, slots=4)
    gt[:, 1:, 2:] = gt[:, 1:, :2] + 5
    boxes = gt[:, torch.randint(0, 2, (len(POINTS),), generator=g)] + torch.randn(boxes.shape, generator=g) * 0.2
    return [scores, boxes, points, labels, gt, mask]


ALL = {**SCENES, "tied": tied, "few": few}
scenes = pytest.mark.parametrize("scene", ALL)


def logit(p: Tensor) -> Tensor:
    return p.clamp(1e-4, 1 - 1e-4).logit()


def mmdet_case(name: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """An assigner of mmdet's and what makes its input of probabilities."""
    mmdet_stub.install()
    import mmdet.models  # noqa: F401
    from mmdet.models.task_modules import assigners

    return getattr(assigners, name)(), logit if name == "DynamicSoftLabelAssigner" else torch.clone


def images(given: Given, prepare: Callable[[Tensor], Tensor]) -> Iterator[tuple[Any, Any]]:
    """Predictions and truth of each image, as mmdet has them."""
    from mmengine.structures import InstanceData

    scores, boxes, _, labels, gt, mask = given
    for b in range(len(scores)):
        real_ones = mask[b, :, 0] > 0
        yield (
            InstanceData(priors=PRIORS, bboxes=boxes[b], scores=prepare(scores[b])),
            InstanceData(bboxes=gt[b, real_ones], labels=labels[b, real_ones, 0].long()),
        )


def same(got: Any, want: Any, but: Tensor | None = None) -> int:
    """Equal results, but at some priors; the number of positives."""
    assert got.num_gts == want.num_gts
    for part in ("gt_inds", "labels", "max_overlaps"):
        g, w = getattr(got, part), getattr(want, part)
        differs = (g != w) if but is None else (g != w) & ~but
        assert g.dtype == w.dtype and not differs.any(), f"{part} differ at {int(differs.sum())} priors"
    return int((want.gt_inds > 0).sum())


def penalised(result: Any, truth: Any) -> Tensor:
    """Where SimOTA gave a prior to no box, or to one that it is not inside of and near to the centre of. Of a penalty
    of 10^5 and a cost fp32 leaves 1/128: there an ulp of the cost may change places."""
    box = truth.bboxes[(result.gt_inds - 1).clamp(min=0)]
    inside = (PRIORS[:, :2] > box[:, :2]) & (PRIORS[:, :2] < box[:, 2:])
    near = (PRIORS[:, :2] - (box[:, :2] + box[:, 2:]) / 2).abs() < 2.5 * PRIORS[:, 2:]
    return (result.gt_inds == 0) | ~(inside & near).all(1)


@needs("mmdet")
@scenes
@pytest.mark.parametrize("name", ["DynamicSoftLabelAssigner", "SimOTAAssigner"])
def test_mmdet(name: str, scene: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    module, prepare = mmdet_case(name)
    positives = 0
    for predicted, truth in images(ALL[scene](generator), prepare):
        cuts = Cuts()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "topk", cuts)
            want = module.assign(predicted, truth)
        if scene in SCENES and cuts.hang_on_rounding:
            continue
        with compat.patch():
            got = module.assign(predicted, truth)
        close = None
        if name == "SimOTAAssigner" and scene in ("tied", "few") and len(truth):
            close = penalised(got, truth) & penalised(want, truth)
            moved = int((got.gt_inds != want.gt_inds).sum())
            print(f"{moved} priors differ, at penalised costs; {int((want.gt_inds > 0).sum())} are positive")
        positives += same(got, want, close)
    assert positives > (3 if scene == "few" else 20)


@needs("mmdet")
@pytest.mark.parametrize("name", ["DynamicSoftLabelAssigner", "SimOTAAssigner"])
def test_mmdet_where_nothing_is_to_assign(name: str, generator: torch.Generator) -> None:
    """No object, none in reach of a location, no prior."""
    module, prepare = mmdet_case(name)
    predicted, truth = next(images(drawn(generator), prepare))
    far = truth[:3]
    far.bboxes = far.bboxes + 1e5
    for given in ((predicted, truth[:0]), (predicted, far), (predicted[:0], truth)):
        want = module.assign(*given)
        with compat.patch():
            assert same(module.assign(*given), want) == 0


@needs("mmdet")
@pytest.mark.parametrize("name", ["DynamicSoftLabelAssigner", "SimOTAAssigner"])
def test_mmdet_keeps_what_ours_does_not_serve(name: str, generator: torch.Generator) -> None:
    """An overlap of one's own; theirs is in fp32 and fails in fp64."""
    module, prepare = mmdet_case(name)
    predicted, truth = next(images(drawn(generator), prepare))

    class Half(type(module.iou_calculator)):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **options: Any) -> Tensor:
            return super().__call__(*arguments, **options) * 0.5

    module.iou_calculator = Half()
    want = module.assign(predicted, truth)
    with compat.patch():
        assert same(module.assign(predicted, truth), want)


@needs("mmdet")
def test_registry(generator: torch.Generator) -> None:
    mmdet_stub.install()
    from mmdet.registry import TASK_UTILS

    import gfl_ops.compat.mmdet_registry  # noqa: F401

    for name in ("DynamicSoftLabelAssigner", "SimOTAAssigner"):
        module, prepare = mmdet_case(name)
        ours = TASK_UTILS.build({"type": f"Fused{name}"})
        assert isinstance(ours, type(module)) and type(ours).assign is not type(module).assign
        for predicted, truth in images(drawn(generator), prepare):
            same(ours.assign(predicted, truth), module.assign(predicted, truth))


@needs("mmyolo")
@scenes
@pytest.mark.parametrize("batch_iou", [True, False])
def test_mmyolo(scene: str, batch_iou: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, boxes, _, labels, gt, mask = ALL[scene](generator)
    module = mmyolo_assigner("BatchDynamicSoftLabelAssigner")(num_classes=scores.shape[-1], batch_iou=batch_iou)
    given = (boxes, logit(scores), PRIORS, labels, gt, mask)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "sort", stable_sort)
        want = module(*given)
    with compat.patch() as names:
        assert any(name.endswith("BatchDynamicSoftLabelAssigner") for name in names)
        got = module(*given)
        none = module(*given[:3], *(x[:, :0] for x in given[3:]))
    assert list(got) == list(want) and (none["assigned_labels"] == module.num_classes).all()
    for part, w in want.items():
        assert got[part].dtype == w.dtype and torch.equal(got[part], w), part
    assert int((want["assigned_labels"] < module.num_classes).sum()) > (3 if scene == "few" else 20)


@needs("mmyolo")
def test_mmyolo_registry() -> None:
    theirs = mmyolo_assigner("BatchDynamicSoftLabelAssigner")
    from mmyolo.registry import TASK_UTILS

    from gfl_ops.compat import mmdet_registry as registry

    if "FusedBatchDynamicSoftLabelAssigner" not in TASK_UTILS:  # imported while mmyolo refused mmcv
        registry.register_batch_assigners()
    # Not by `build`, which looks in the scope that a test before may have set.
    ours = TASK_UTILS.get("FusedBatchDynamicSoftLabelAssigner")(num_classes=3)
    assert isinstance(ours, theirs) and type(ours).forward is not theirs.forward
