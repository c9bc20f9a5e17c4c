# SPDX-License-Identifier: Apache-2.0
"""The task-aligned assigners of ultralytics, YOLOv6, mmyolo and mmdet against ours, on drawn and on real boxes."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peers import mmdet_stub
from peers.assignment_scenes import (
    SCENES,
    STRIDES,
    by_lower_index,
    check,
    drawn,
    mmyolo_assigner,
    needs,
    scenes,
    theirs_of_wide_cuts,
)
from torch import Tensor

from gfl_ops.compat import mmdet as compat_mmdet
from gfl_ops.compat import ultralytics as compat
from gfl_ops.compat import yolov6 as compat_yolov6

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    compat.unpatch()
    compat_mmdet.unpatch()


def ultralytics_class() -> Any:
    # It asks the network at import otherwise.
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    from ultralytics.utils.tal import TaskAlignedAssigner

    return TaskAlignedAssigner


def ultralytics_assigner(topk2: int | None = None, **options: Any) -> tuple[Any, list[Callable[..., Any]]]:
    """Theirs, and what has to give the same: it patched, and in 8.4 our class, which takes what theirs does there."""
    cls = ultralytics_class()
    v84 = "stride" in inspect.signature(cls).parameters
    if topk2 is not None and not v84:
        pytest.skip("one-to-one heads are of ultralytics 8.4")
    if v84:
        options |= {"topk2": topk2, "stride": STRIDES}
    theirs = cls(**options)

    def patched(*given: Tensor) -> Any:
        with compat.patch(loss=False):
            return theirs(*given)

    return theirs, [patched, *([compat.TaskAlignedAssigner(**options)] if v84 else [])]


@needs("ultralytics")
@scenes
@pytest.mark.parametrize(("topk", "topk2"), [(10, None), (7, 1), (13, 3)], ids=str)
def test_ultralytics(scene: str, topk: int, topk2: int | None, generator: torch.Generator) -> None:
    classes = 80 if scene == "real" else 12
    theirs, ours = ultralytics_assigner(topk=topk, topk2=topk2, num_classes=classes, alpha=0.5)
    given, want = theirs_of_wide_cuts(lambda: SCENES[scene](generator), lambda given: theirs(*given))
    assert int(want[3].sum()) > 30
    for call in ours:
        check(call(*given), want)
    # torch's own order of ties on a CPU moves none but positives without a score.
    plain = theirs(*given)
    moved = (plain[3] != want[3]) | (want[3] & (plain[4] != want[4]))
    assert not (plain[2].amax(-1)[moved] > 0).any() and not (want[2].amax(-1)[moved] > 0).any()
    torch.testing.assert_close(plain[2], want[2], rtol=0, atol=0)


@needs("ultralytics")
def test_ultralytics_where_metrics_tie(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal scores and boxes of equal size, as a new head predicts; objects at whole cells, some of them the same."""
    scores, _, points, labels, gt, mask = drawn(generator)
    gt = (gt / 16).round() * 16
    gt[0, 5:10] = gt[0, :5]
    boxes = torch.cat([points - 20, points + 20], -1).expand(3, -1, -1).contiguous()
    scores = torch.full_like(scores, 0.25)
    # A box of few locations, of which the first ones have no score.
    gt[0, 12] = torch.tensor([0.0, 0, 24, 24])
    scores[0, :3] = scores[0, 100:300] = 0
    theirs, ours = ultralytics_assigner(topk=10, num_classes=scores.shape[-1], alpha=0.5)
    given = [scores, boxes, points, labels, gt, mask]
    monkeypatch.setattr(torch, "topk", by_lower_index)
    want = theirs(*given)
    assert (want[3] & (want[2].amax(-1) == 0)).any(), "no positive without a score"
    for call in ours:
        check(call(*given), want)


@needs("ultralytics")
def test_ultralytics_without_objects(generator: torch.Generator) -> None:
    given = drawn(generator)
    theirs, ours = ultralytics_assigner(num_classes=12)
    for slots in (0, 4):
        empty = [*given[:3], *(x[:, :slots] * 0 for x in given[3:])]
        for call in ours:
            check(call(*empty), theirs(*empty), 0)


@needs("ultralytics")
def test_ultralytics_subclasses_keep_their_own(generator: torch.Generator) -> None:
    class Own(ultralytics_class()):  # type: ignore[misc]
        def iou_calculation(self, gt_bboxes: Tensor, pd_bboxes: Tensor) -> Tensor:
            return torch.full_like(gt_bboxes[..., 0], 0.5)

    given = drawn(generator)
    module = Own(num_classes=12)
    want = module(*given)
    with compat.patch(loss=False):
        check(module(*given), want, 0)


@needs("yolov6")
@scenes
def test_yolov6(scene: str, generator: torch.Generator) -> None:
    from yolov6.assigners.tal_assigner import TaskAlignedAssigner

    given = SCENES[scene](generator)
    options = {"topk": 13, "num_classes": given[0].shape[-1]}
    want = TaskAlignedAssigner(**options)(*given)
    got = compat_yolov6.TaskAlignedAssigner(**options)(*given)
    scored = want[3] & (want[2].amax(-1) > 0)
    assert torch.equal(got[3] & (got[2].amax(-1) > 0), scored) and int(scored.sum()) > 100
    check(tuple(x[scored] for x in got), tuple(x[scored] for x in want))


@needs("mmyolo")
@scenes
@pytest.mark.parametrize("use_ciou", [False, True])
def test_mmyolo(scene: str, use_ciou: bool, generator: torch.Generator) -> None:
    scores, boxes, points, labels, gt, mask = SCENES[scene](generator)
    module = mmyolo_assigner("BatchTaskAlignedAssigner")(
        num_classes=scores.shape[-1], topk=10, alpha=0.5, beta=6.0, eps=1e-9, use_ciou=use_ciou
    )
    given = (boxes, scores, torch.cat([points, points], 1), labels, gt, mask)
    want = module(*given)
    with compat_mmdet.patch() as names:
        assert names[-1].endswith("BatchTaskAlignedAssigner")
        got = module(*given)
    assert list(got) == list(want)
    scored = want["fg_mask_pre_prior"] & (want["assigned_scores"].amax(-1) > 0)
    assert torch.equal(got["fg_mask_pre_prior"] & (got["assigned_scores"].amax(-1) > 0), scored)
    check(tuple(got[k][scored] for k in want), tuple(want[k][scored] for k in want), 2e-5)


@needs("mmdet")
@scenes
def test_mmdet(scene: str, generator: torch.Generator) -> None:
    mmdet_stub.install()
    import mmdet.models  # noqa: F401
    from mmdet.models.task_modules.assigners import TaskAlignedAssigner
    from mmengine.structures import InstanceData

    scores, boxes, points, labels, gt, mask = SCENES[scene](generator)
    module, priors = TaskAlignedAssigner(topk=13), torch.cat([points - 4, points + 4], 1)
    for b in range(len(scores)):
        real_ones = mask[b, :, 0] > 0
        predicted = InstanceData(priors=priors, bboxes=boxes[b], scores=scores[b])
        truth = InstanceData(bboxes=gt[b, real_ones], labels=labels[b, real_ones, 0].long())
        want = module.assign(predicted, truth)
        with compat_mmdet.patch():
            got = module.assign(predicted, truth)
        parts = ("gt_inds", "labels", "max_overlaps", "assign_metrics")
        check(tuple(getattr(got, k) for k in parts), tuple(getattr(want, k) for k in parts))
        assert got.num_gts == want.num_gts and (got.gt_inds.any() or not real_ones.any())
