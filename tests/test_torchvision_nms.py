# SPDX-License-Identifier: Apache-2.0
"""NMS against torchvision's, as sets: it orders equal scores differently, and its class offsets cost low bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends, random_inputs
from gfl_ops.ops.boxes import box_ops

torchvision_boxes = pytest.importorskip("torchvision.ops.boxes", reason="torchvision is not installed")
pytestmark = pytest.mark.peers

BACKENDS = [b for b in ("native", "reference") if backends.unavailable(b, "nms", "cpu") is None]
THRESHOLDS = (0.3, 0.5, 0.6, 0.75)


def clear_cut(boxes: Tensor, scores: Tensor, idxs: Tensor | None, threshold: float, ulps: float) -> Tensor:
    """Indices of boxes that can be told apart by either: no IoU near the threshold, no equal scores."""
    near = (box_ops.pairwise_iou(boxes, boxes) - threshold).abs() <= ulps * torch.finfo(torch.float32).eps * threshold
    if idxs is not None:
        near &= idxs[:, None] == idxs
    unique = (scores[:, None] == scores).sum(1) == 1
    return torch.nonzero(~near.any(1) & unique).flatten()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extent", [40.0, 300.0])
def test_nms(backend: str, extent: float, generator: torch.Generator) -> None:
    boxes = random_inputs.boxes(600, torch.device("cpu"), torch.float32, generator, extent=extent)
    boxes[::3] = boxes[::3].round() - 20
    scores = torch.rand(600, generator=generator)
    for threshold in THRESHOLDS:
        keep = clear_cut(boxes, scores, None, threshold, 2)
        assert len(keep) > 300
        with gfl_ops.set_backend(backend):
            got = gfl_ops.nms(boxes[keep], scores[keep], threshold)
        assert got.tolist() == torchvision_boxes.nms(boxes[keep], scores[keep], threshold).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["_batched_nms_vanilla", "_batched_nms_coordinate_trick"])
def test_batched_nms(backend: str, strategy: str, generator: torch.Generator) -> None:
    boxes = random_inputs.boxes(900, torch.device("cpu"), torch.float32, generator, extent=120.0)
    scores = torch.rand(900, generator=generator)
    idxs = torch.randint(0, 7, (900,), generator=generator)
    # An offset of up to 7·121 rounds coordinates to 2⁻¹⁵, which moves the IoU of small boxes by far more than 2 ulp.
    ulps = 2 if strategy == "_batched_nms_vanilla" else 2000
    for threshold in THRESHOLDS:
        keep = clear_cut(boxes, scores, idxs, threshold, ulps)
        assert len(keep) > 450
        with gfl_ops.set_backend(backend):
            got = gfl_ops.batched_nms(boxes[keep], scores[keep], idxs[keep], threshold)
        theirs = getattr(torchvision_boxes, strategy)(boxes[keep], scores[keep], idxs[keep], threshold)
        assert set(got.tolist()) == set(theirs.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_boxes(backend: str) -> None:
    """Boxes without area, inverted boxes and NaN are treated alike."""
    nan = float("nan")
    rows = ["0000", "0000", "0022", "2200", "002n", "0022", "1111", "0020"]
    boxes = torch.tensor([[nan if c == "n" else float(c) for c in row] for row in rows])
    scores = torch.linspace(1, 0, len(boxes))
    for threshold in (-0.5, 0.0, 0.5, 1.0, 1.5):
        with gfl_ops.set_backend(backend):
            got = gfl_ops.nms(boxes, scores, threshold)
        assert got.tolist() == torchvision_boxes.nms(boxes, scores, threshold).tolist(), threshold
