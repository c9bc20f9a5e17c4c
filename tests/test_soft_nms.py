# SPDX-License-Identifier: Apache-2.0
"""Soft-NMS: against a plain loop, its limits, and what its errors say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends, random_inputs
from gfl_ops.ops.boxes import box_ops

pytestmark = pytest.mark.usefixtures("everywhere")

BACKENDS = [b for b in ("native", "reference") if backends.unavailable(b, "soft_nms", "cpu") is None]
METHODS = ("linear", "gaussian")


def loop(
    boxes: Tensor, scores: Tensor, idxs: list[int], threshold: float, sigma: float, minimum: float, method: str
) -> dict[int, float]:
    """Index to final score, in Python's doubles; the best box is taken whatever its score."""
    iou = box_ops.pairwise_iou(boxes, boxes).tolist()
    left = dict(enumerate(scores.tolist()))
    taken: dict[int, float] = {}
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        taken[best] = left.pop(best)
        for i in list(left):
            overlap = iou[best][i] if idxs[i] == idxs[best] else 0.0
            if method == "linear":
                weight = 1 - overlap if overlap >= threshold else 1.0
            else:
                weight = math.exp(-(overlap**2) / sigma) if overlap == overlap else 1.0
            left[i] *= weight
            if left[i] < minimum:
                del left[i]
    return taken


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 20),
    classes=st.sampled_from([0, 1, 3]),
    numbers=st.tuples(
        st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([0.1, 0.5, 4.0]), st.sampled_from([0.0, 1e-3, 0.3, 2.0])
    ),
)
@settings(max_examples=25, deadline=None)
def test_it_is_the_loop(
    backend: str, method: str, seed: int, n: int, classes: int, numbers: tuple[float, float, float]
) -> None:
    g = torch.Generator().manual_seed(seed)
    # Doubles, so that the loop in Python's numbers decides alike; a grid, for boxes without area and equal ones.
    corner = torch.randint(0, 6, (n, 2), generator=g).double()
    boxes = torch.cat([corner, corner + torch.randint(0, 5, (n, 2), generator=g)], 1)
    scores = torch.rand(n, generator=g, dtype=torch.float64)
    idxs = torch.randint(0, max(classes, 1), (n,), generator=g)
    with gfl_ops.set_backend(backend):
        keep, final = gfl_ops.soft_nms(boxes, scores, idxs if classes else None, *numbers, method)
    want = loop(boxes, scores, idxs.tolist(), *numbers, method)
    assert keep.dtype == torch.int64 and final.dtype == torch.float32
    assert sorted(keep.tolist()) == sorted(want)
    torch.testing.assert_close(final, torch.tensor([want[i] for i in keep.tolist()], dtype=torch.float32))
    assert keep.tolist() == sorted(want, key=lambda i: (-want[i], i))


@pytest.mark.skipif(len(BACKENDS) < 2, reason="the compiled extension is not there")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_backends_agree_to_the_index(method: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    n = 300
    boxes = random_inputs.boxes(n, torch.device("cpu"), dtype, generator, extent=120.0)
    boxes[:100] = boxes[:100].round()
    scores = torch.randint(1, 200, (n,), generator=generator).to(dtype) / 200
    idxs = torch.randint(-1, 3, (n,), generator=generator)
    for classes in (None, idxs):
        found = []
        for backend in BACKENDS:
            with gfl_ops.set_backend(backend):
                found.append(gfl_ops.soft_nms(boxes, scores, classes, min_score=0.02, method=method))
        assert found[0][0].tolist() == found[1][0].tolist()
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decayed_box_may_change_places(backend: str) -> None:
    """The second box overlaps the first by half and ends below the third, which is alone."""
    boxes = torch.tensor([[0.0, 0, 2, 1], [1.0, 0, 2, 1], [5.0, 5, 6, 6]])
    scores = torch.tensor([0.9, 0.8, 0.5])
    with gfl_ops.set_backend(backend):
        keep, final = gfl_ops.soft_nms(boxes, scores)
        assert keep.tolist() == [0, 2, 1]
        torch.testing.assert_close(final, torch.tensor([0.9, 0.5, 0.4]))
        keep, final = gfl_ops.soft_nms(boxes, scores, method="gaussian")
        torch.testing.assert_close(final[keep == 1], torch.tensor([0.8 * math.exp(-0.5)]))
        # Another class is not touched; the threshold counts as reached.
        assert gfl_ops.soft_nms(boxes, scores, torch.tensor([0, 1, 0]))[1].tolist() == scores.tolist()
        assert gfl_ops.soft_nms(boxes, scores, iou_threshold=0.5)[0].tolist() == [0, 2, 1]
        assert gfl_ops.soft_nms(boxes, scores, iou_threshold=0.5001)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_box_is_kept_whatever_its_score(backend: str) -> None:
    boxes = torch.tensor([[0.0, 0, 2, 1], [1.0, 0, 2, 1], [5.0, 5, 6, 6]])
    scores = torch.tensor([1e-5, 2e-5, -1.0])
    with gfl_ops.set_backend(backend):
        for idxs in (None, torch.arange(3)):
            keep, final = gfl_ops.soft_nms(boxes, scores, idxs)
            assert keep.tolist() == [1] and final.tolist() == scores[[1]].tolist()
        keep, final = gfl_ops.soft_nms(boxes[:0], scores[:0])
        assert keep.shape == final.shape == (0,) and keep.dtype == torch.int64 and final.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity(backend: str, method: str) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, nan], [0, 0, 1, 1], [-inf, -inf, inf, inf], [0, 0, 0, 0]])
    scores = torch.tensor([0.5, 0.4, nan, 0.3, -inf])
    with gfl_ops.set_backend(backend):
        keep, final = gfl_ops.soft_nms(boxes, scores, method=method)
    # The box with a NaN score comes first and wears down its twin; the NaN box and the infinite one stay as they are.
    weight = 0.0 if method == "linear" else math.exp(-2.0)
    order = [2, 1, 3] if method == "linear" else [2, 1, 3, 0]
    assert keep.tolist() == order
    want = torch.tensor([0.5 * weight, 0.4, nan, 0.3, -inf])[order]
    torch.testing.assert_close(final, want, equal_nan=True)


BOXES, SCORES, IDXS = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"boxes": BOXES[:, :3]}, ValueError, r"gfl_ops.soft_nms: `boxes` must have shape \[N, 4\]"),
        ({"boxes": BOXES.int()}, TypeError, "`boxes` must have one of the dtypes"),
        ({"scores": SCORES[:2]}, ValueError, r"`scores` must have shape \[N\] = \[3\], got \[2\]"),
        ({"idxs": IDXS[:2]}, ValueError, r"`idxs` must have shape \[N\] = \[3\], got \[2\]"),
        ({"idxs": SCORES.to(torch.complex64)}, TypeError, "`idxs` must have one of the dtypes"),
        ({"iou_threshold": float("nan")}, ValueError, "`iou_threshold` must not be NaN"),
        ({"sigma": 0.0}, ValueError, "`sigma` must be > 0, got 0.0"),
        ({"sigma": "x"}, TypeError, "`sigma` must be a number"),
        ({"min_score": None}, TypeError, "`min_score` must be a number"),
        ({"method": "naive"}, ValueError, "`method` must be one of 'linear', 'gaussian', got 'naive'"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gfl_ops.soft_nms(**({"boxes": BOXES, "scores": SCORES} | arguments))


def test_a_direct_call_of_the_operator_is_checked() -> None:
    if "native" not in BACKENDS:
        pytest.skip("the compiled extension is not there")
    for arguments in (
        (BOXES[:, :3], SCORES, None, 0.3, 0.5, 0.1, False),
        (BOXES, SCORES[:2], None, 0.3, 0.5, 0.1, False),
        (BOXES, SCORES, IDXS.int(), 0.3, 0.5, 0.1, False),
        (BOXES, SCORES, IDXS[:1], 0.3, 0.5, 0.1, False),
        (BOXES, SCORES, None, 0.3, 0.0, 0.1, True),
    ):
        with pytest.raises((ValueError, TypeError), match="gfl: `"):
            torch.ops.gfl.soft_nms(*arguments)
