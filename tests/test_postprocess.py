# SPDX-License-Identifier: Apache-2.0
"""`postprocess` against plain Python loops, and what its contract says of ranking, layouts and bad input."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import pytest
import torch
from postprocess_calls import RUNS, flat, moved, run
from postprocess_loops import loops
from torch import Tensor

import gfl_ops
from gfl_ops import Detections
from gfl_ops.core import backends
from gfl_ops.ops.select.postprocess_reference import ranking_threshold


def exact_bins(batch: int, reg_max: int, h: int, w: int, generator: torch.Generator) -> Tensor:
    """Distributions whose mean every arithmetic gets exactly, so that IoUs on both sides are the same number."""
    values = torch.full((batch, 4, reg_max + 1, h, w), -1000.0)
    for chosen in torch.randint(reg_max + 1, (2, batch, 4, 1, h, w), generator=generator):
        values.scatter_(2, chosen, 0.0)
    return values.flatten(1, 2)


def drawn_case(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    levels, batch, classes, reg_max = (
        draw.randint(1, 3),
        draw.randint(1, 3),
        draw.choice([1, 3, 20]),
        draw.randint(1, 16),
    )
    activated = draw.random() < 0.2
    cls, reg = [], []
    for _ in range(levels):
        h, w = draw.randint(1, 6), draw.randint(1, 9)
        # Quarters: many ties.
        values = (torch.randn((batch, classes, h, w), generator=generator) * 8).round() / 4
        cls.append(values.sigmoid() if activated else values)
        reg.append(exact_bins(batch, reg_max, h, w, generator))
    sizes = [(float(draw.randint(10, 60)), float(draw.randint(10, 60))) for _ in range(batch)]
    keywords = {
        "reg_max": reg_max,
        "score_threshold": draw.choice([0.0, 0.05, 0.3, 0.7]),
        "nms_pre": draw.choice([-1, 0, 1, 7, 40]),
        # Between quotients of small integers, or a number that fp32 holds.
        "iou_threshold": draw.choice([0.3, 0.5, 0.6, 0.77]),
        "max_detections": draw.choice([1, 5, 100]),
        "center_offset": [draw.choice([0.0, 0.5, 0.25]) for _ in range(levels)],
        "topk_mode": draw.choice(["pair", "anchor"]),
        "scale_factors": [(draw.uniform(0.5, 2), draw.uniform(0.5, 2)) for _ in range(batch)]
        if draw.random() < 0.5
        else None,
        "activated": activated,
        "legacy": draw.random() < 0.3,
    }
    return (cls, reg, [8.0 * 2**level for level in range(levels)], sizes), keywords


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_it_is_what_the_loops_say(backend: str, device: str, seed: int) -> None:
    for case in range(40):
        args, keywords = drawn_case(seed + case)
        want = loops(*args, **keywords)
        with gfl_ops.set_backend(backend):
            got = gfl_ops.postprocess(moved(args[0], device), moved(args[1], device), *args[2:], **keywords)
        boxes, scores, labels, count, locations = (t.cpu() for t in got)
        assert count.tolist() == [len(w) for w in want], (seed + case, keywords)
        for image, detections in enumerate(want):
            n = len(detections)
            assert labels[image, :n].tolist() == [d[1] for d in detections], (seed + case, keywords)
            assert locations[image, :n].tolist() == [d[3] for d in detections], (seed + case, keywords)
            expected = torch.tensor([d[0] for d in detections], dtype=torch.float32)
            torch.testing.assert_close(scores[image, :n], expected, rtol=1e-6, atol=0)
            expected = torch.tensor([d[2] for d in detections], dtype=torch.float32).reshape(-1, 4)
            torch.testing.assert_close(boxes[image, :n], expected, rtol=1e-6, atol=0)
            assert not boxes[image, n:].any() and not scores[image, n:].any() and (labels[image, n:] == -1).all()
            assert (locations[image, n:] == -1).all()


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_uncertainty_of_each_side_by_its_formulas(
    backend: str, device: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """One class and no suppression: a detection's place, and so its distributions, are found by its score."""
    reg_max, batch = 16, 2
    sizes = [(4, 5), (2, 3)]
    ranks = torch.stack([torch.randperm(26, generator=generator) for _ in range(batch)]) / 13 - 1
    cls = [ranks[:, :20].reshape(batch, 1, 4, 5), ranks[:, 20:].reshape(batch, 1, 2, 3)]
    reg = [(torch.randn((batch, 4 * (reg_max + 1), *s), generator=generator) * 3).to(dtype) for s in sizes]
    args = (cls, reg, [8.0, 16.0], [(1e6, 1e6)] * batch)
    options = {"reg_max": reg_max, "score_threshold": 0.3, "iou_threshold": 1.0, "max_detections": 30}
    got = run(backend, device, args, **options)
    distributions = gfl_ops.side_distributions(reg, got.locations, reg_max)
    uncertainty = gfl_ops.side_uncertainty(distributions)
    assert uncertainty.shape == (batch, 30, 4, 3) and uncertainty.dtype == torch.float32
    rows = torch.cat([r.flatten(2) for r in reg], 2).double().permute(0, 2, 1).unflatten(2, (4, reg_max + 1))
    for image in range(batch):
        n = int(got.count[image])
        assert n == 24  # two logits are below that of 0.3
        p = rows[image, ranks[image].argsort(descending=True)[:n]].softmax(-1)
        bins = torch.arange(reg_max + 1, dtype=torch.float64)
        mean = (p * bins).sum(-1, keepdim=True)
        want = [(p * (bins - mean) ** 2).sum(-1), torch.special.entr(p).sum(-1), p.amax(-1)]
        torch.testing.assert_close(distributions[image, :n], p.float())
        # Sums over 17 bins in fp32.
        torch.testing.assert_close(uncertainty[image, :n], torch.stack(want, -1).float(), rtol=1e-5, atol=1e-6)
        assert not uncertainty[image, n:].any()


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_the_uncertainty_of_sharp_and_flat_distributions(backend: str, device: str) -> None:
    args = flat([(1, 3)], classes=1)
    args[0][0][0, 0, 0] = torch.tensor([3.0, 2.0, 1.0])
    args[1][0][0, ::2, 0, 0] = 500.0  # all in bin 0 of each side
    args[1][0][0, 1::2, 0, 1] = math.inf
    got = run(backend, device, args, iou_threshold=1.0, center_offset=2.0, max_detections=4)
    uncertainty = gfl_ops.side_uncertainty(gfl_ops.side_distributions(args[1], got.locations, 1))
    # Without a width the first is dropped: sharp at 1, flat over two bins, nothing.
    assert got.count.tolist() == [2]
    assert uncertainty[0, 0].tolist() == [[0.0, 0.0, 1.0]] * 4
    torch.testing.assert_close(uncertainty[0, 1], torch.tensor([[0.25, math.log(2), 0.5]] * 4))
    assert not uncertainty[0, 2:].any()


BAD_DISTRIBUTIONS = [
    ({"reg_preds": torch.zeros(1, 8, 2, 3)}, TypeError, "`reg_preds` must be a list of tensors"),
    ({"reg_max": 16}, ValueError, "`reg_preds` must have 4(R+1) = 68 channels, got 8"),
    ({"locations": torch.zeros(1, 5)}, TypeError, "`locations` must have one of the dtypes int64"),
    ({"locations": torch.zeros(2, 5).long()}, ValueError, "`locations` must have shape [B, K] = [1, K], got [2, 5]"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_DISTRIBUTIONS, ids=[b[2][:24] for b in BAD_DISTRIBUTIONS])
def test_bad_input_of_the_distributions(change: dict[str, Any], error: type, text: str) -> None:
    arguments = {"reg_preds": [torch.zeros(1, 8, 2, 3)], "locations": torch.zeros(1, 5).long(), "reg_max": 1}
    with pytest.raises(error) as raised:
        gfl_ops.side_distributions(**{**arguments, **change})
    assert str(raised.value).startswith("gfl_ops.side_distributions: ") and text in str(raised.value)


def test_distributions_have_a_gradient_and_empty_levels() -> None:
    reg = [torch.randn(2, 8, h, 3).requires_grad_() for h in (0, 2)]
    p = gfl_ops.side_distributions(reg, torch.tensor([[5, -1], [0, 0]]), 1)
    assert p.shape == (2, 2, 4, 2) and not p[0, 1].any()
    torch.testing.assert_close(p[0, 0], reg[1][0, :, 1, 2].view(4, 2).softmax(-1))
    p[..., 0].sum().backward()
    assert reg[1].grad is not None and reg[1].grad[0, :, 1, 2].abs().min() > 0 and not reg[1].grad[0, :, 0].any()


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_ties_go_to_the_lower_level_location_class(backend: str, device: str) -> None:
    args = flat([(2, 3), (1, 2)])
    got = run(backend, device, args, iou_threshold=1.0, max_detections=20)
    places = [(y * 8 + 0.0, x * 8 + 0.0, c) for y in range(2) for x in range(3) for c in range(2)]
    places += [(0.0, x * 8 + 0.0, c) for x in range(2) for c in range(2)]
    assert got.count.tolist() == [16]
    assert [(b[1], b[0], c) for b, c in zip(got.boxes[0].tolist(), got.labels[0].tolist(), strict=True)][:16] == places
    # The cut falls within a tie, and counts pairs or locations.
    pairs = run(backend, device, args, nms_pre=3, iou_threshold=1.0)
    assert pairs.count.tolist() == [6] and pairs.labels[0, :6].tolist() == [0, 1, 0, 0, 1, 0]
    anchors = run(backend, device, args, nms_pre=1, topk_mode="anchor", iou_threshold=1.0)
    assert anchors.count.tolist() == [4] and anchors.labels[0, :4].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_logits_rank_where_the_sigmoid_saturates(backend: str, device: str) -> None:
    args = flat([(1, 6)], classes=1)
    args[0][0][0, 0, 0] = torch.tensor([20.0, 60.0, 40.0, 1e4, 25.0, 3e38])
    got = run(backend, device, args)
    assert (got.boxes[0, :6, 0] / 8).int().tolist() == [5, 3, 1, 2, 4, 0]
    assert got.scores[0, :6].tolist() == [1.0] * 6


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_nan_and_infinities_are_defined(backend: str, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    args = flat([(1, 6)], classes=1)
    args[0][0][0, 0, 0] = torch.tensor([nan, inf, -inf, -0.0, 0.0, 2.0])
    args[1][0][0, 0, 0, 5] = nan  # the box of the last has no left side
    got = run(backend, device, args, score_threshold=0.0)
    assert got.count.tolist() == [3]
    assert (got.boxes[0, :3, 0] / 8).int().tolist() == [1, 3, 4]
    assert got.scores[0, :3].tolist() == [1.0, 0.5, 0.5]
    # An infinite logit takes all of the mass; two share it.
    args[1][0][0, :, 0, 1] = torch.tensor([0.0, inf, inf, inf, -inf, -inf, inf, 0.0])
    got = run(backend, device, args, score_threshold=0.9)
    assert got.boxes[0, 0].tolist() == [12 - 8.0, 4 - 4.0, 12 + 4.0, 4.0]


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("activated", [False, True])
def test_the_threshold_is_exclusive(backend: str, device: str, activated: bool) -> None:
    threshold = 0.3
    limit = torch.tensor(ranking_threshold(threshold, activated), dtype=torch.float32)
    args = flat([(1, 3)], classes=1)
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    args[0][0][0, 0, 0] = torch.stack([torch.nextafter(limit, up), limit, torch.nextafter(limit, down)])
    assert run(backend, device, args, score_threshold=threshold, activated=activated).count.tolist() == [1]
    assert run(backend, device, args, score_threshold=1.0, activated=activated).count.tolist() == [0]
    assert run(backend, device, args, score_threshold=-1.0, activated=activated).count.tolist() == [3]


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_layout_gives_the_same_bits(
    backend: str, device: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    cls = [torch.randn((3, 20, h, w), generator=generator).mul(2).to(dtype) for h, w in ((9, 13), (4, 7), (1, 5))]
    reg = [torch.randn((3, 68, *c.shape[2:]), generator=generator).to(dtype) for c in cls]

    def sliced(t: Tensor) -> Tensor:
        big = torch.full((t.shape[0], t.shape[1] + 3, t.shape[2] + 1, t.shape[3] + 2), 9.0, dtype=dtype)
        big[:, 1:-2, 1:, 2:] = t
        return big[:, 1:-2, 1:, 2:]

    layouts = [
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        lambda t: sliced(t),
        lambda t: sliced(t).contiguous(memory_format=torch.channels_last)[:, :, :, :],
    ]
    results = []
    for layout in layouts:
        args = ([layout(c) for c in cls], [layout(r) for r in reg], [8.0, 16.0, 32.0], [(70.0, 100.0)] * 3)
        results.append(run(backend, device, args, reg_max=16, nms_pre=100))
    assert int(results[0].count.min()) > 10
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # fp64 maps are rounded to fp32, and 16-bit ones hold fp32 numbers; the two lists may differ in dtype.
    args = ([c.float() for c in cls], [r.double() for r in reg], [8.0, 16.0, 32.0], [(70.0, 100.0)] * 3)
    mixed = run(backend, device, args, reg_max=16, nms_pre=100)
    assert all(torch.equal(a, b) for a, b in zip(results[0], mixed, strict=True))


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_expanded_maps_are_read_in_place(backend: str, device: str) -> None:
    cls = torch.tensor([1.0, 2.0])[None, :, None, None].expand(2, 2, 3, 4)
    reg = torch.zeros(1).expand(2, 8, 3, 4)
    got = run(backend, device, ([cls], [reg], [8.0], [(24, 32)] * 2), iou_threshold=1.0)
    assert got.count.tolist() == [24, 24] and got.labels[0, :24].tolist() == [1] * 12 + [0] * 12


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_empty_input(backend: str, device: str) -> None:
    got = run(backend, device, flat([(2, 3)], batch=0), max_detections=7)
    assert [tuple(t.shape) for t in got] == [(0, 7, 4), (0, 7), (0, 7), (0,), (0, 7)]
    got = run(backend, device, flat([(0, 3), (3, 0)], batch=2))
    assert got.count.tolist() == [0, 0] and (got.labels == -1).all()
    got = run(backend, device, flat([(2, 3)], classes=0))
    assert got.count.tolist() == [0]
    got = run(backend, device, flat([(2, 3)]), max_detections=0)
    assert tuple(got.boxes.shape) == (1, 0, 4) and got.count.tolist() == [0]


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_sizes_may_be_of_any_number_type(backend: str, device: str) -> None:
    args = flat([(3, 4)], batch=2)
    want = run(backend, device, (*args[:3], [(20, 21.0), (9, 30)]))
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float64, torch.float32, torch.float16):
        sizes = torch.tensor([[20, 21], [9, 30]], dtype=dtype)
        got = run(backend, device, (*args[:3], sizes), scale_factors=torch.ones((2, 2), dtype=dtype))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert want.boxes[1, :, 3].max() == 9 and want.boxes[0, :, 2].max() == 21


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_boxes_without_extent_are_dropped_before_suppression(backend: str, device: str) -> None:
    args = flat([(1, 4)], classes=1)
    # The last two cells lie wholly outside of the image; what is left of them has no width.
    got = run(backend, device, (*args[:3], [(8, 16)]))
    assert got.count.tolist() == [2]
    # They don't take slots of nms_pre back either: the cut comes first.
    args[0][0][0, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert run(backend, device, (*args[:3], [(8, 16)]), nms_pre=2).count.tolist() == [0]


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_suppression_is_by_class(backend: str, device: str) -> None:
    args = flat([(1, 1)], classes=1203)
    got = run(backend, device, args, max_detections=2000, nms_pre=0)
    assert got.count.tolist() == [1203] and got.labels[0, :1203].tolist() == list(range(1203))
    args = flat([(1, 1), (1, 1)], classes=3)
    assert run(backend, device, args).count.tolist() == [3]
    assert run(backend, device, args, iou_threshold=1.0).count.tolist() == [6]
    assert run(backend, device, args, iou_threshold=-1.0, center_offset=[0.5, 40.0]).count.tolist() == [3]


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_eight_levels_and_the_longest_distribution(backend: str, device: str, generator: torch.Generator) -> None:
    cls = [torch.ones((1, 1, 2, 2)) for _ in range(8)]
    reg = [exact_bins(1, 128, 2, 2, generator) for _ in range(8)]
    args = (cls, reg, [2.0**i for i in range(8)], [(5000.0, 5000.0)])
    want = loops(*args, 128, 0.05, 1000, 0.6, 100, [0.5] * 8, "pair", None, False, False)
    got = run(backend, device, args, reg_max=128)
    assert got.count.tolist() == [len(want[0])]
    expected = torch.tensor([d[2] for d in want[0]], dtype=torch.float32)
    torch.testing.assert_close(got.boxes[0, : len(want[0])], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_there_is_no_gradient_and_no_warning(backend: str, device: str) -> None:
    args = flat([(2, 3)])
    cls = [c.requires_grad_() for c in args[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(backend, device, (cls, *args[1:]))
    assert not any(t.requires_grad for t in got)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_it_compiles_into_one_graph(backend: str, device: str, generator: torch.Generator) -> None:
    def detect(cls: list[Tensor], reg: list[Tensor], sizes: Tensor) -> tuple[Tensor, Detections]:
        found = gfl_ops.postprocess(cls, reg, [8.0, 16.0], sizes, reg_max=4, center_offset=0.5, score_threshold=0.3)
        return found.boxes * 2, found

    torch._dynamo.reset()
    with gfl_ops.set_backend(backend):
        compiled = torch.compile(detect, fullgraph=True, backend="aot_eager", dynamic=True)
        for h, w in ((6, 8), (4, 10)):
            cls = [torch.randn((2, 3, h // s, w // s), generator=generator).to(device) for s in (1, 2)]
            reg = [torch.randn((2, 20, h // s, w // s), generator=generator).to(device) for s in (1, 2)]
            sizes = torch.tensor([[40.0, 60.0], [30.0, 70.0]], device=device)
            twice, got = compiled(cls, reg, sizes)
            want = gfl_ops.postprocess(cls, reg, [8.0, 16.0], sizes, reg_max=4, center_offset=0.5, score_threshold=0.3)
            assert isinstance(got, Detections) and torch.equal(twice, want.boxes * 2)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: there is no CUDA graph to capture")
@pytest.mark.skipif(
    backends.unavailable("native", "postprocess", "cuda") is not None, reason="the extension has no CUDA part"
)
@pytest.mark.parametrize("topk_mode", ["pair", "anchor"])
def test_a_cuda_graph_replays_it_with_new_input(topk_mode: str, generator: torch.Generator) -> None:
    cls = [torch.zeros((2, 20, s, s + 3), device="cuda") for s in (12, 6)]
    reg = [torch.zeros((2, 68, s, s + 3), device="cuda") for s in (12, 6)]
    sizes = torch.tensor([[90.0, 100.0], [80.0, 60.0]], device="cuda")
    options: Any = {"nms_pre": 50, "topk_mode": topk_mode}

    def detect() -> Any:
        with gfl_ops.set_backend("native"):
            return gfl_ops.postprocess(cls, reg, [8.0, 16.0], sizes, **options)

    detect()  # loads the kernels, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = detect()
    for shift in (0.0, -50.0, 4.0):
        for maps, spread, offset in ((cls, 2.0, shift - 2), (reg, 2.0, 0.0)):
            for m in maps:
                m.copy_(torch.randn(m.shape, generator=generator) * spread + offset)
        graph.replay()
        got, want = [t.clone() for t in captured], detect()
        assert (int(want.count.max()) > 0) == (shift >= 0)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
