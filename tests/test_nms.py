# SPDX-License-Identifier: Apache-2.0
"""NMS: what it means, box by box, and that every backend gives the same indices."""

from __future__ import annotations

import math

import cuda_sources
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends, random_inputs
from gfl_ops.ops.boxes import box_ops
from gfl_ops.ops.select.nms import NMS

pytestmark = pytest.mark.usefixtures("everywhere")

BACKENDS = [b for b in ("native", "reference", "triton") if backends.unavailable(b, "nms", "cpu") is None]
# The CUDA kernels, compiled for the host: the walk in panels, and a block a class.
EVERYWHERE = [*BACKENDS, "host-panels", "host-classes"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def loop(boxes: Tensor, scores: Tensor, idxs: Tensor | None, threshold: float) -> list[int]:
    """The definition, pair by pair, in Python's numbers."""

    iou, values = box_ops.pairwise_iou(boxes, boxes).tolist(), scores.tolist()
    classes = [0] * len(values) if idxs is None else idxs.tolist()
    limit = box_ops.rounded(threshold, boxes.dtype)

    def before(i: int) -> tuple[bool, float, int]:
        return (not math.isnan(values[i]), 0.0 if math.isnan(values[i]) else -values[i], i)

    kept: list[int] = []
    for i in sorted(range(len(values)), key=before):
        if not any(classes[i] == classes[j] and iou[i][j] > limit for j in kept):
            kept.append(i)
    return kept


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Boxes on a coarse grid, so that equal boxes, touching ones and IoUs exactly at the threshold come up."""
    n = draw(st.integers(0, 24))
    step = draw(st.sampled_from([1.0, 0.25, 100.0]))
    corner = st.integers(-6, 6)
    size = st.integers(0, 6)
    rows = draw(st.lists(st.tuples(corner, corner, size, size), min_size=n, max_size=n))
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows], dtype=torch.float32).reshape(-1, 4) * step
    score = st.one_of(st.integers(-3, 3).map(float), st.just(float("nan")), st.just(-0.0), st.just(float("-inf")))
    scores = torch.tensor(draw(st.lists(score, min_size=n, max_size=n)), dtype=torch.float32)
    classes = draw(st.none() | st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    idxs = None if classes is None else torch.tensor(classes, dtype=torch.int64)
    return boxes, scores, idxs, draw(st.sampled_from([0.0, 0.25, 0.5, 1 / 3, 0.6, 1.0, -1.0, 2.0]))


Call = tuple[Tensor, Tensor, Tensor | None, float]


def run(backend: str, boxes: Tensor, scores: Tensor, idxs: Tensor | None, threshold: float) -> Tensor:
    if backend.startswith("host-"):
        return cuda_sources.nms(boxes, scores, idxs, threshold, by_class=backend == "host-classes")
    with gfl_ops.set_backend(backend):
        if idxs is None:
            return gfl_ops.nms(boxes, scores, threshold)
        return gfl_ops.batched_nms(boxes, scores, idxs, threshold)


@pytest.mark.parametrize("backend", EVERYWHERE)
@given(call=calls())
@settings(max_examples=50, deadline=None)
def test_it_is_the_definition(backend: str, call: Call) -> None:
    assert run(backend, *call).tolist() == loop(*call)


@pytest.mark.parametrize("backend", EVERYWHERE)
@given(call=calls())
@settings(max_examples=30, deadline=None)
def test_kept_boxes_are_apart_and_every_dropped_one_overlaps_a_kept_better_one(backend: str, call: Call) -> None:
    boxes, scores, idxs, threshold = call
    keep = run(backend, *call)
    place = torch.empty(len(boxes), dtype=torch.int64)
    place[torch.sort(scores, stable=True, descending=True).indices] = torch.arange(len(boxes))
    hit = box_ops.pairwise_iou(boxes, boxes) > box_ops.rounded(threshold, torch.float32)
    if idxs is not None:
        hit &= idxs[:, None] == idxs
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    kept[keep] = True
    hit.fill_diagonal_(False)
    assert not hit[kept][:, kept].any()
    assert (hit & (place[:, None] > place) & kept)[~kept].any(1).all()
    assert place[keep].tolist() == sorted(place[keep].tolist())


@pytest.mark.parametrize("backend", EVERYWHERE)
@given(call=calls(), order=st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_permuting_the_input_permutes_the_output(backend: str, call: Call, order: object) -> None:
    boxes, _, idxs, threshold = call
    scores = torch.arange(len(boxes), dtype=torch.float32) - 3.0
    moved = torch.tensor(order.sample(range(len(boxes)), len(boxes)), dtype=torch.int64)
    straight = run(backend, boxes, scores, idxs, threshold)
    permuted = run(backend, boxes[moved], scores[moved], None if idxs is None else idxs[moved], threshold)
    assert moved[permuted].tolist() == straight.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_boxes_are_apart_and_dropped_ones_overlap_a_better(
    backend: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    n, threshold = 400, 0.4
    boxes = random_inputs.boxes(n, torch.device("cpu"), dtype, generator, extent=150.0) - 75
    scores = torch.rand(n, generator=generator).to(dtype)
    idxs = torch.randint(0, 3, (n,), generator=generator)
    with gfl_ops.set_backend(backend):
        keep = gfl_ops.batched_nms(boxes, scores, idxs, threshold)
    ranked = torch.sort(scores, stable=True, descending=True).indices
    place = torch.empty_like(ranked)
    place[ranked] = torch.arange(n)
    assert place[keep].tolist() == sorted(place[keep].tolist())
    hit = (box_ops.pairwise_iou(boxes, boxes) > box_ops.rounded(threshold, dtype)) & (idxs[:, None] == idxs)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[keep] = True
    assert 0 < int(kept.sum()) < n
    assert not (hit[kept][:, kept] & ~torch.eye(int(kept.sum()), dtype=torch.bool)).any()
    better = place[:, None] > place
    assert (hit & better & kept)[~kept].any(1).all()


@pytest.mark.skipif(len(BACKENDS) < 2, reason="the compiled extension is not there")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("legacy", [False, True], ids=["", "legacy"])
def test_backends_agree_to_the_index(dtype: torch.dtype, legacy: bool, generator: torch.Generator) -> None:
    """Integer boxes tie exactly at the threshold; nearly equal ones come within an ulp of it."""
    n = 600
    boxes = random_inputs.boxes(n, torch.device("cpu"), dtype, generator, extent=200.0)
    boxes[: n // 2] = boxes[: n // 2].round()
    boxes[-100:] = boxes[:100] * (1 + 1e-6)
    scores = torch.randint(0, 150, (n,), generator=generator).to(dtype) / 150
    idxs = torch.randint(0, 3, (n,), generator=generator)
    for threshold in (1 / 3, 0.6):
        for classes in (None, idxs):
            found = []
            for backend in BACKENDS:
                with gfl_ops.set_backend(backend):
                    found.append(NMS("cpu", boxes, scores, classes, threshold, legacy).tolist())
            assert all(f == found[0] for f in found[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_threshold_is_rounded_to_the_arithmetic(backend: str) -> None:
    """An IoU of fp32(0.6) exactly is not above 0.6, although it is greater than the double of that name."""
    boxes = torch.tensor([[0.0, 0.0, 5.0, 1.0], [0.0, 0.0, 3.0, 1.0]])
    scores = torch.tensor([1.0, 0.5])
    with gfl_ops.set_backend(backend):
        assert gfl_ops.nms(boxes, scores, 0.6).tolist() == [0, 1]
        assert gfl_ops.nms(boxes, scores, 0.6 - 1e-7).tolist() == [0]
        assert gfl_ops.nms(boxes.double(), scores, 0.6).tolist() == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_are_compared_not_shifted(backend: str) -> None:
    """Huge and negative coordinates side by side, where an offset per class would cost the small boxes their bits."""
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.5, 1.0], [-1e9, -1e9, 1e9, 1e9], [0.0, 0.0, 1.0, 1.01]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    idxs = torch.tensor([2**62, 2**62, 7, -(2**62)])
    with gfl_ops.set_backend(backend):
        assert gfl_ops.batched_nms(boxes, scores, idxs, 0.5).tolist() == [0, 1, 2, 3]
        assert gfl_ops.batched_nms(boxes, scores, torch.zeros(4, dtype=torch.uint8), 0.3).tolist() == [0, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, nan], [0, 0, 1, 1], [-inf, -inf, inf, inf], [0] * 4, [0] * 4])
    scores = torch.tensor([0.1, nan, nan, inf, 0.0, -0.0])
    with gfl_ops.set_backend(backend):
        # NaN scores first; a NaN box neither suppresses nor is suppressed; boxes without area do not touch each other.
        assert gfl_ops.nms(boxes, scores, 0.0).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(backend: str, dtype: torch.dtype) -> None:
    with gfl_ops.set_backend(backend):
        for keep in (
            gfl_ops.nms(torch.empty(0, 4, dtype=dtype), torch.empty(0, dtype=dtype), 0.5),
            gfl_ops.batched_nms(torch.empty(0, 4, dtype=dtype), torch.empty(0), torch.empty(0, dtype=torch.int32), 0.5),
        ):
            assert keep.dtype == torch.int64 and keep.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_is_left_alone_and_may_need_a_gradient(backend: str, generator: torch.Generator) -> None:
    boxes = random_inputs.boxes(50, torch.device("cpu"), torch.float32, generator).requires_grad_()
    scores = torch.rand(50, generator=generator, requires_grad=True)
    before = boxes.detach().clone(), scores.detach().clone()
    with gfl_ops.set_backend(backend):
        keep = gfl_ops.nms(boxes, scores, 0.5)
    assert not keep.requires_grad
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])
    boxes[keep].sum().backward()


def test_the_count_may_change_in_one_compiled_graph(generator: torch.Generator) -> None:
    def best(boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
        return boxes[gfl_ops.batched_nms(boxes, scores, idxs, 0.5)] * 2

    torch._dynamo.reset()
    compiled = torch.compile(best, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (40, 77, 5):
        boxes = random_inputs.boxes(n, torch.device("cpu"), torch.float32, generator, extent=60.0)
        scores, idxs = torch.rand(n, generator=generator), torch.randint(0, 2, (n,), generator=generator)
        torch.testing.assert_close(compiled(boxes, scores, idxs), best(boxes, scores, idxs), rtol=0, atol=0)


BOXES, SCORES, IDXS = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((BOXES[0], SCORES, IDXS, 0.5), ValueError, r"gfl_ops.batched_nms: `boxes` must have shape \[N, 4\]"),
        ((BOXES[:, :3], SCORES, IDXS, 0.5), ValueError, r"`boxes` must have shape .*, got \[3, 3\]"),
        ((BOXES.long(), SCORES, IDXS, 0.5), TypeError, "`boxes` must have one of the dtypes"),
        (([[0, 0, 1, 1]], SCORES, IDXS, 0.5), TypeError, "`boxes` must be a tensor, got list"),
        ((BOXES, SCORES[:2], IDXS, 0.5), ValueError, r"`scores` must have shape \[N\] = \[3\], got \[2\]"),
        ((BOXES, SCORES[:, None], IDXS, 0.5), ValueError, r"`scores` must have shape \[N\] = \[3\], got \[3, 1\]"),
        ((BOXES, IDXS, IDXS, 0.5), TypeError, "`scores` must have one of the dtypes"),
        ((BOXES, SCORES.to("meta"), IDXS, 0.5), ValueError, "`scores` must be on the device of `boxes`, cpu, got meta"),
        ((BOXES, SCORES, IDXS[:1], 0.5), ValueError, r"`idxs` must have shape \[N\] = \[3\], got \[1\]"),
        ((BOXES, SCORES, SCORES, 0.5), TypeError, "`idxs` must have one of the dtypes int64"),
        ((BOXES, SCORES, IDXS, "0.5"), TypeError, "`iou_threshold` must be a number, got str"),
        ((BOXES, SCORES, IDXS, float("nan")), ValueError, "`iou_threshold` must not be NaN"),
    ],
)
def test_errors(arguments: tuple[object, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gfl_ops.batched_nms(*arguments)
    if "idxs" in text:
        return
    with pytest.raises(error, match=text.replace("batched_nms", "nms")):
        gfl_ops.nms(arguments[0], arguments[1], arguments[3])


def test_a_direct_call_of_the_operator_is_checked() -> None:
    if "native" not in BACKENDS:
        pytest.skip("the compiled extension is not there")
    for arguments in (
        (BOXES[:, :3], SCORES, IDXS, 0.5, False),
        (BOXES, SCORES[:2], IDXS, 0.5, False),
        (BOXES, SCORES, IDXS[:2], 0.5, False),
        (BOXES, SCORES, IDXS.int(), 0.5, False),
    ):
        with pytest.raises((ValueError, TypeError), match="gfl: `"):
            torch.ops.gfl.nms(*arguments)
