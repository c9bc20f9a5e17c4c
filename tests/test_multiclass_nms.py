# SPDX-License-Identifier: Apache-2.0
"""Multiclass NMS: against plain loops, and what its errors say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends, random_inputs
from gfl_ops.ops.boxes import box_ops

pytestmark = pytest.mark.usefixtures("everywhere")

BACKENDS = [b for b in ("native", "reference") if backends.unavailable(b, "multiclass_nms", "cpu") is None]


def loop(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, limit: int
) -> list[tuple[list[float], float, int]]:
    """Detections one by one, in Python's numbers."""
    n, c = scores.shape
    minimum = box_ops.rounded(score_threshold, scores.dtype)
    limit_iou = box_ops.rounded(iou_threshold, boxes.dtype)
    shared = boxes.shape[1] == 4
    pairs = [(i, j) for i in range(n) for j in range(c) if scores[i, j].item() > minimum]
    pairs.sort(key=lambda pair: -scores[pair].item())
    kept: list[tuple[Tensor, float, int]] = []
    for i, j in pairs:
        box = boxes[i] if shared else boxes[i, 4 * j : 4 * j + 4]
        if not any(label == j and box_ops.aligned_iou(box, other).item() > limit_iou for other, _, label in kept):
            kept.append((box, scores[i, j].item(), j))
    kept = kept[:limit] if limit > 0 else kept
    return [(box.tolist(), score, label) for box, score, label in kept]


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 12),
    c=st.integers(1, 4),
    shared=st.booleans(),
    limit=st.sampled_from([-1, 0, 1, 3, 100]),
    thresholds=st.tuples(st.sampled_from([0.0, 0.25, 0.5, -1.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0])),
)
@settings(max_examples=25, deadline=None)
def test_it_is_the_loop(
    backend: str, seed: int, n: int, c: int, shared: bool, limit: int, thresholds: tuple[float, float]
) -> None:
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 8, (n, 1 if shared else c, 2), generator=g).float()
    size = torch.randint(0, 6, corner.shape, generator=g).float()
    boxes = torch.cat([corner, corner + size], 2).flatten(1)
    scores = torch.randint(-1, 5, (n, c), generator=g).float() / 4
    scores[scores < 0] = float("nan")
    with gfl_ops.set_backend(backend):
        got = gfl_ops.multiclass_nms(boxes, scores, *thresholds, limit)
    found = [(box, score, label) for box, score, label in zip(got[0].tolist(), got[1].tolist(), got[2].tolist())]
    assert found == loop(boxes, scores, *thresholds, limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_shapes(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    boxes = random_inputs.boxes(40, torch.device("cpu"), dtype, generator)
    scores = torch.rand((40, 3), generator=generator).to(torch.bfloat16)
    with gfl_ops.set_backend(backend):
        found, score, label = gfl_ops.multiclass_nms(boxes.requires_grad_(), scores, 0.2, 0.6, 7)
        assert found.dtype == dtype and score.dtype == torch.bfloat16 and label.dtype == torch.int64
        assert found.shape == (7, 4) and score.shape == label.shape == (7,)
        assert not found.requires_grad
        assert score.float().diff().le(0).all()
        for n, c in ((0, 3), (5, 0)):
            found, score, label = gfl_ops.multiclass_nms(boxes[:n], scores[:n, :c], 0.2, 0.6, 7)
            assert found.shape == (0, 4) and score.shape == label.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_score_threshold_is_rounded_to_the_arithmetic(backend: str) -> None:
    """A score of fp32(0.1) exactly is not above 0.1, although it is greater than the double of that name."""
    boxes, scores = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.1]])
    with gfl_ops.set_backend(backend):
        assert len(gfl_ops.multiclass_nms(boxes, scores, 0.1, 0.5, 10)[1]) == 0
        assert len(gfl_ops.multiclass_nms(boxes, scores, 0.1 - 1e-8, 0.5, 10)[1]) == 1


BOXES, SCORES = torch.zeros(3, 4), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((BOXES, SCORES[:, 0], 0.1, 0.5, 1), ValueError, r"gfl_ops.multiclass_nms: `scores` must have shape \[N, C\]"),
        (
            (BOXES[:2], SCORES, 0.1, 0.5, 1),
            ValueError,
            r"`boxes` must .* \[3, 4\] or \[N, 4C\] = \[3, 8\], got \[2, 4\]",
        ),
        ((torch.zeros(3, 12), SCORES, 0.1, 0.5, 1), ValueError, r"`boxes` must have shape .*, got \[3, 12\]"),
        ((torch.zeros(3, 2, 4), SCORES, 0.1, 0.5, 1), ValueError, r"`boxes` must have shape .*, got \[3, 2, 4\]"),
        ((BOXES.long(), SCORES, 0.1, 0.5, 1), TypeError, "`boxes` must have one of the dtypes"),
        ((BOXES, SCORES.long(), 0.1, 0.5, 1), TypeError, "`scores` must have one of the dtypes"),
        ((BOXES.to("meta"), SCORES, 0.1, 0.5, 1), ValueError, "`boxes` must be on the device of `scores`"),
        ((BOXES, SCORES, None, 0.5, 1), TypeError, "`score_threshold` must be a number"),
        ((BOXES, SCORES, float("nan"), 0.5, 1), ValueError, "`score_threshold` must not be NaN"),
        ((BOXES, SCORES, 0.1, float("nan"), 1), ValueError, "`iou_threshold` must not be NaN"),
        ((BOXES, SCORES, 0.1, 0.5, 1.5), TypeError, "`max_detections` must be an integer"),
    ],
)
def test_errors(arguments: tuple[object, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gfl_ops.multiclass_nms(*arguments)


def test_a_direct_call_of_the_operator_is_checked() -> None:
    if "native" not in BACKENDS:
        pytest.skip("the compiled extension is not there")
    for boxes, scores in ((BOXES[:2], SCORES), (torch.zeros(3, 12), SCORES), (BOXES, SCORES[0]), (BOXES.int(), SCORES)):
        with pytest.raises((ValueError, TypeError), match="gfl: `"):
            torch.ops.gfl.multiclass_nms(boxes, scores, 0.1, 0.5, 1)
